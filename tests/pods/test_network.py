"""The pods themselves: what reaches what, what a pod sees, and that nothing stays."""

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.pods_parts.network import Network, Pod, inside
from tests.pods.namespaces import require_namespaces

_LISTEN = f"{shlex.quote(sys.executable)} -m http.server 8000 --bind 0.0.0.0 --directory /tmp/ray"
_WITHIN_S = 20.0


@pytest.fixture
def network() -> Iterator[Network]:
    require_namespaces()
    network = Network()
    try:
        yield network
    finally:
        network.close()


def _reaches(space: str, address: str) -> bool:
    asked = ["curl", "-s", "-o", "/dev/null", "-m", "1", f"http://{address}:8000/"]
    return subprocess.run(inside(space, asked)).returncode == 0


def _until(space: str, address: str, wanted: bool) -> None:
    deadline = time.monotonic() + _WITHIN_S
    while _reaches(space, address) is not wanted:
        assert time.monotonic() < deadline, f"{address} is {'not ' if wanted else ''}reached"


@pytest.mark.slow
def test_pods_reach_each_other_unless_cut_off(network: Network, tmp_path: Path) -> None:
    client, _ = network.join("client")
    pod = Pod(network, "server", tmp_path, "1m", {"PATH": "/usr/local/bin:/usr/bin:/bin"})
    pod.start(_LISTEN)
    try:
        _until(client, pod.address, True)
        network.cut(pod.space)
        _until(client, pod.address, False)
        network.heal(pod.space)
        _until(client, pod.address, True)
        assert not pod.run(["curl", "-s", "-m", "1", "http://192.0.2.1/"], _WITHIN_S), "there is a way out"
    finally:
        pod.remove()


def test_a_pod_sees_itself_only_and_ends_when_told(network: Network, tmp_path: Path) -> None:
    pod = Pod(network, "alone", tmp_path, "1m", {"PATH": "/usr/bin:/bin"})
    pod.start("trap 'exit 0' TERM; ls /proc > /tmp/ray/seen; ls /dev/shm >> /tmp/ray/seen; sleep 600 & wait")
    try:
        seen = tmp_path / "ray" / "seen"
        deadline = time.monotonic() + _WITHIN_S
        while not seen.exists() or "1" not in seen.read_text().split():
            assert time.monotonic() < deadline, pod.said()
            time.sleep(0.02)
        processes = [int(name) for name in seen.read_text().split() if name.isdecimal()]
        assert max(processes) < 100
        pod.terminate()
        while not pod.has_ended:
            assert time.monotonic() < deadline, pod.said()
            time.sleep(0.02)
    finally:
        pod.remove()
    assert pod.space not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
