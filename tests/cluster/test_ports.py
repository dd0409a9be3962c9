"""The service's ports: one `up` has them to itself, from before anything listens on them."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.reference.service import free_port
from cluster.cli.main import main
from cluster.ops import ports
from cluster.ops.ports import PortTaken, check_free, check_host

HOLDS = """
import sys
from cluster.ops import ports
with ports.held(http_port=int(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def own_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Path(__file__).parents[1] / "golden" / "tt_moe"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        arguments = ["--set", f"model.checkpoint={checkpoint}", "--set", f"ingress.http_port={port}"]
        assert main(["up", *arguments, "--set", f"ingress.grpc_port={free_port()}"]) == 1
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}: Address already in use; choose another" in error and error.count("\n") == 1


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_a_taken_port_of_ipv6() -> None:
    check_host("::1")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"ingress.http_port: cannot listen on ::1:{port}: Address already in use"):
            check_free("::1", http_port=port)


def test_of_two_that_start_together_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither listens yet; either port is enough, whichever of the two it was for the first."""
    http, grpc, other = free_port(), free_port(), free_port()
    with ports.held(http_port=http, grpc_port=grpc):
        check_free("127.0.0.1", http_port=http, grpc_port=grpc)
        for second in ((http, other), (other, grpc), (grpc, http)):
            settings = [f"ingress.http_port={second[0]}", f"ingress.grpc_port={second[1]}"]
            assert main(["up", "--set", settings[0], "--set", settings[1]]) == 1
            error = capsys.readouterr().err
            assert "another `up` uses it; choose another with --set ingress." in error and error.count("\n") == 1
        with ports.held(http_port=other):  # what was refused has kept nothing
            pass
    with ports.held(http_port=http, grpc_port=grpc):
        pass


def test_a_killed_one_keeps_nothing() -> None:
    port = free_port()
    command = [sys.executable, "-c", HOLDS, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(PortTaken), ports.held(http_port=port):
            pass
        first.kill()
        first.wait(10)
        with ports.held(http_port=port):
            pass
