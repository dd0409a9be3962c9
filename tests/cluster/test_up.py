"""Two `python -m cluster up` at once, from another directory, on a machine with a proxy and an unwritable home.

One serves, with this checkout's code, on loopback only and over TLS, and leaves nothing."""

import ipaddress
import os
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.reference.service import free_port
from cluster.cli.main import main
from tests.certificates import family
from tests.cluster.up_process import CHECKOUT, STOP_S, UpProcess, first_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

SAMPLE_S = 0.5
# Ray's own servers bind every interface and cannot be told otherwise; how many of them each of its processes has.
# Whatever we listen on ourselves (HTTP, gRPC, the exchange) comes on top of these and must be on loopback.
RAYS_OWN = {"ray::ServeReplica": 2, "ray::DashboardAgent": 2, "ray::": 1, "gcs_server": 3, "raylet": 4, "python": 3}
# A proxy that is not there and a list of exceptions without the node's address; a home where nothing can be written.
ADVERSE = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "localhost,127.0.0.1,::1", "HOME": "/sys/kernel"}
NOT_PASSED_ON = ("PYTHONPATH", "grpc_proxy", "no_grpc_proxy", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_KERNEL_NAME = 15  # characters of a name that the kernel keeps; all there is while a process's command line reads empty


class Sampler:
    """Sockets of all processes against the allow-list, from the first one's start to its end, on a thread."""

    def __init__(self, processes: Callable[[], list[psutil.Process]]) -> None:
        self._processes, self._over = processes, threading.Event()
        self.samples, self.outside = 0, set[tuple[str, str]]()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._over.wait(SAMPLE_S):
                for process in self._processes():
                    self.outside |= _outside(process)
                self.samples += 1
        except psutil.NoSuchProcess:
            pass  # the service itself has ended
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        self._over.set()
        self._thread.join(10)
        assert not self._thread.is_alive()


class Up(UpProcess):
    """A running `up` whose sockets are watched."""

    def __init__(self, http: int, grpc: int, *settings: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON} | ADVERSE
        super().__init__(http, grpc, *settings, flags=("--verbose",), environment=environment, cwd=Path("/"))
        self.sampler = Sampler(self.processes)

    def ended(self, within_s: float = STOP_S) -> int:
        try:
            return super().ended(within_s)
        finally:
            self.sampler.stop()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    http, grpc = free_port(), free_port()
    files = family().files(tmp_path_factory.mktemp("certificates"))
    over_tls = [f"ingress.{name}={files[name]}" for name in ("tls_cert_file", "tls_key_file")]
    settings = ("cell.placement=split", "cell.device=cpu", "cell.max_sequences=8", *over_tls)
    running, refused = first_of(Up(http, grpc, *settings), Up(http, grpc, *settings))
    try:
        assert refused.ended() == 1
        assert f"{http}: another `up` uses it" in refused.said and "starting Ray" not in refused.said, refused.said
        running.wait_until_ready()
        running.trust = ssl.create_default_context(cadata=family().root.pem.decode())
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


def test_every_process_runs_this_checkout(up: Up) -> None:
    """Started in `/`: Router and Cell log where their code is, towers where theirs is."""
    code = set(re.findall(r"runs the code in (\S+)", up.said))
    towers = re.findall(r"'tower': '(\w+)'.*?'library': '([^']+)'", up.said)
    assert len(re.findall(r"runs the code in", up.said)) >= 2, up.said
    assert code == {str(CHECKOUT)}
    assert dict(towers) == {name: str(CHECKOUT / "twotower") for name in ("ContextProcess", "DenoiserProcess")}


def test_our_commands_reach_it_over_tls(up: Up, capsys: pytest.CaptureFixture[str]) -> None:
    """By the certificate that its note names. Its answers are asked for below."""
    assert main(["status", "--http-port", str(up.http)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^ready +yes$", said, re.MULTILINE) and f"https://127.0.0.1:{up.http}" in said
    assert re.search(r"^model +tt_moe ", said, re.MULTILINE), "asked over gRPC"


def test_nothing_but_loopback(up: Up) -> None:
    """From the first process's start on, and while requests run."""
    before = up.sampler.samples
    assert before > 0, "nothing was sampled while the service started"
    deadline = time.monotonic() + 30
    while up.sampler.samples < before + 5:
        assert len(up.ask()["choices"][0]["token_ids"]) == 20
        assert up.sampler.error is None and time.monotonic() < deadline
    assert not up.sampler.outside


def _outside(process: psutil.Process) -> set[tuple[str, str]]:
    """(process, address) of connections that leave loopback, and of listeners beyond Ray's own that are not on it."""
    try:
        name, sockets = _kind(process), process.net_connections(kind="inet")
        if _kind(process) != name:
            return set()  # it has just become another; the next sample has it
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        assert _vanishes(process), f"{process} lives, but cannot be looked at"
        return set()
    found = {(name, str(s.raddr)) for s in sockets if s.raddr and not _loopback(s.raddr.ip)}
    wide = [s for s in sockets if s.status == psutil.CONN_LISTEN and not _loopback(s.laddr.ip)]
    if len(wide) > _allowed(name):
        found |= {(name, f"listens on {s.laddr.ip}:{s.laddr.port}") for s in wide}
    return found


def _allowed(name: str) -> int:
    return next((count for prefix, count in RAYS_OWN.items() if name.startswith(prefix[:_KERNEL_NAME])), 0)


def test_rays_servers_are_known_by_the_kernels_short_names_too() -> None:
    """The command line of a process that changes its title or ends reads empty for a moment."""
    assert _allowed("ray::DashboardAgent") == _allowed("ray::DashboardAgent"[:_KERNEL_NAME]) == 2
    assert _allowed("ray::ServeReplica:app:Cell") == _allowed("ray::ServeRepli") == 2
    assert _allowed("ray::ContextActor") == 1 and _allowed("another") == 0


def _vanishes(process: psutil.Process, within_s: float = 2.0) -> bool:
    """The kernel hides the sockets of a process that is ending before it calls it ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if not process.is_running() or process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


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
        for listener in process.net_connections(kind="inet"):
            if listener.status == psutil.CONN_LISTEN and listener.laddr.port in (up.http, up.grpc):
                assert _loopback(listener.laddr.ip), listener
                listening[listener.laddr.port] += 1
    assert set(listening) == {up.http, up.grpc}


def test_it_stops_cleanly_and_leaves_nothing(up: Up) -> None:
    """Last: ends the service that the tests above used."""
    processes = up.processes()
    assert len(processes) > 5
    assert up.stop() == 0
    assert up.sampler.error is None and not up.sampler.outside
    assert "stopped" in up.said
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not alive
    assert "Traceback" not in up.said, up.said
