"""`python -m cluster up` from another directory: this checkout's code, loopback only, and nothing left afterwards."""

import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.service import free_port
from tests.goldens import GOLDEN_DIR

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

CHECKOUT = Path(__file__).resolve().parents[2]
START_S, STOP_S = 120, 30
# Ray's own servers bind every interface and cannot be told otherwise; how many of them each of its processes has.
# Whatever we listen on ourselves (HTTP, gRPC, the exchange) comes on top of these and must be on loopback.
RAYS_OWN = {"ray::ServeReplica": 2, "ray::DashboardAgent": 2, "ray::": 1, "gcs_server": 3, "raylet": 4, "python": 3}


class Up:
    """A running `up` and everything it has said."""

    def __init__(self, *settings: str) -> None:
        self.http, self.grpc = free_port(), free_port()
        command = [sys.executable, "-m", "cluster", "up", "--verbose"]
        for setting in (f"ingress.http_port={self.http}", f"ingress.grpc_port={self.grpc}", *settings):
            command += ["--set", setting]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            command, cwd="/", env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while "Ctrl-C stops it" not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP_S)
        finally:
            self.process.kill()
            self._reader.join(5)
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    running = Up(f"model.checkpoint={(GOLDEN_DIR / 'tt_moe').resolve()}", "cell.device=cpu", "cell.max_sequences=8")
    try:
        running.wait_until_ready()
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


def _ask(up: Up) -> list[int]:
    body = {"prompt": [1, 5, 9], "max_tokens": 20, "ignore_eos": True}
    request = urllib.request.Request(f"http://127.0.0.1:{up.http}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        tokens: list[int] = json.load(response)["choices"][0]["token_ids"]
    return tokens


def test_every_process_runs_this_checkout(up: Up) -> None:
    """Started in `/`: Router and Cell log where their code is, towers where theirs is."""
    code = set(re.findall(r"runs the code in (\S+)", up.said))
    towers = re.findall(r"'tower': '(\w+)'.*?'library': '([^']+)'", up.said)
    assert len(re.findall(r"runs the code in", up.said)) >= 2, up.said
    assert code == {str(CHECKOUT)}
    assert dict(towers) == {name: str(CHECKOUT / "twotower") for name in ("ContextActor", "DenoiserActor")}


def test_nothing_but_loopback(up: Up) -> None:
    """Sockets of all our processes, sampled while requests run, against the allow-list."""
    outside: set[tuple[str, str]] = set()
    for _ in range(5):
        assert len(_ask(up)) == 20
        for process in up.processes():
            outside |= _outside(process)
    assert not outside


def _outside(process: psutil.Process) -> set[tuple[str, str]]:
    """(process, address) of connections that leave loopback, and of listeners beyond Ray's own that are not on it."""
    try:
        name, sockets = _kind(process), process.net_connections(kind="inet")
    except psutil.Error:
        return set()
    found = {(name, str(s.raddr)) for s in sockets if s.raddr and not _loopback(s.raddr.ip)}
    wide = [s for s in sockets if s.status == psutil.CONN_LISTEN and not _loopback(s.laddr.ip)]
    allowed = next(count for prefix, count in RAYS_OWN.items() if name.startswith(prefix))
    if len(wide) > allowed:
        found |= {(name, f"listens on {s.laddr.ip}:{s.laddr.port}") for s in wide}
    return found


def _kind(process: psutil.Process) -> str:
    words = process.cmdline()
    title = words[0] if words else process.name()
    return title if title.startswith("ray::") else Path(title).name.split(":")[0].rstrip("0123456789.")


def _loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def test_our_own_ports_are_on_loopback(up: Up) -> None:
    listening: Counter[int] = Counter()
    for process in up.processes():
        for socket in process.net_connections(kind="inet"):
            if socket.status == psutil.CONN_LISTEN and socket.laddr.port in (up.http, up.grpc):
                assert _loopback(socket.laddr.ip), socket
                listening[socket.laddr.port] += 1
    assert set(listening) == {up.http, up.grpc}


def test_it_stops_cleanly_and_leaves_nothing(up: Up) -> None:
    """Last: ends the service that the tests above used."""
    processes = up.processes()
    assert len(processes) > 5
    assert up.stop() == 0
    assert "stopped" in up.said
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not alive
    assert "Traceback" not in up.said, up.said
