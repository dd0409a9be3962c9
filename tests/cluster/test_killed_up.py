"""`kill -9` of an `up`: nothing of it stays, not even a tower that hangs. The next `up` says so and serves, until an
interrupted `down` ends it at once."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.reference.service import free_port
from cluster.ops import left_behind, run_state
from tests.cluster.test_stopping import LONGEST, Streams
from tests.cluster.up_process import CHECKOUT, UpProcess

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

SETTINGS = ("cell.placement=colocated", "cell.device=cpu", "cell.max_sequences=2")
LONG_STREAMS = ("cluster.drain_timeout_s=300", f"model.max_sequence_length={LONGEST}")
HANG = ("ray::ColocatedActor", "ray::ServeReplica:twotower:Cell")  # a tower, and who would kill it


@pytest.fixture(autouse=True)
def own_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def _kinds(processes: list[psutil.Process]) -> dict[psutil.Process, str]:
    return {process: " ".join(process.cmdline()) for process in processes}


def test_what_is_left_of_killed_ones(tmp_path: Path) -> None:
    shared, ports = _shared_memory(), (free_port(), free_port())
    first = UpProcess(*ports, *SETTINGS)
    try:
        first.wait_until_ready()
        hung = _killed_with_a_hung_tower(first)
        _, alive = psutil.wait_procs(hung, timeout=30)
        assert not alive, "the guard ends what does not end by itself"
    finally:
        first.ended()
    note = tmp_path / "twotower" / f"service-{ports[0]}.json"
    assert json.loads(note.read_text())["pid"] == first.process.pid
    second = UpProcess(*ports, *SETTINGS)
    try:
        second.wait_until_ready()
        assert f"(pid {first.process.pid}) was killed; cleared: its note\n" in second.said, second.said
        left = _killed_with_a_hung_tower(second, and_guard=True)
    finally:
        second.ended()
    third = UpProcess(*ports, *SETTINGS, *LONG_STREAMS)
    try:
        third.wait_until_ready()
        [line] = [line for line in third.lines if f"(pid {second.process.pid}) was killed; cleared: its note, " in line]
        assert "ray::DashboardAgent" in line, (
            line
        )  # which stays for a minute; the kernel may have ended what is stopped
        assert not any(process.is_running() for process in left), left
        assert len(third.ask()["choices"][0]["token_ids"]) == 20
        running = third.processes()
        asyncio.run(_an_interrupted_down_ends_it(third))
        assert third.ended() == 0 and "was killed" not in third.said.replace(line, ""), third.said
        assert "Traceback" not in third.said, third.said
    finally:
        if third.process.poll() is None:
            third.stop()
    _, alive = psutil.wait_procs(running, timeout=5)
    assert not alive and not note.exists()
    assert _shared_memory() <= shared


def _killed_with_a_hung_tower(up: UpProcess, and_guard: bool = False) -> list[psutil.Process]:
    """All processes of an `up` that was killed, some of which do not notice."""
    kinds = _kinds(up.processes())
    hung = [process for process, kind in kinds.items() if kind.startswith(HANG)]
    assert len(hung) == len(HANG)
    [guard] = [process for process, kind in kinds.items() if "cluster.ops.left_behind" in kind]
    for process in hung:
        process.send_signal(signal.SIGSTOP)
    if and_guard:
        guard.kill()
    up.process.kill()
    return list(kinds)


async def _an_interrupted_down_ends_it(up: UpProcess) -> None:
    """And what runs on it, at once."""
    streams = Streams(up, LONGEST - 100)
    await streams.begun()
    command = [sys.executable, "-m", "cluster", "down", "--http-port", str(up.http)]
    with subprocess.Popen(command, cwd=CHECKOUT, text=True, stderr=subprocess.PIPE) as down:
        assert down.stderr is not None
        said = await asyncio.to_thread(down.stderr.readline)
        assert said == "waiting for the running requests, for 300 s at most; Ctrl-C ends them now\n"
        down.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(60):
                await streams.ended()
        except TimeoutError:
            raise AssertionError(f"streams go on after the second signal; it said: {up.said}") from None
        assert await asyncio.to_thread(down.wait, 40) == 0
    streams.were_told()


def test_a_controller_that_was_killed_leaves_nothing_either() -> None:
    up = UpProcess(free_port(), free_port(), *SETTINGS)
    try:
        up.wait_until_ready()
        kinds = _kinds(up.processes())
        [controller] = [process for process, kind in kinds.items() if kind.startswith("ray::ServeController")]
        controller.kill()
        psutil.wait_procs([controller], timeout=10)
        running = {*kinds, *up.processes()}
        assert len(up.ask()["choices"][0]["token_ids"]) == 20, "what runs goes on without it"
        running |= set(up.processes())
        up.process.send_signal(signal.SIGTERM)
        assert up.ended(60) == 0, up.said
    finally:
        if up.process.poll() is None:
            up.stop()
    _, alive = psutil.wait_procs(list(running), timeout=5)
    assert not alive


@pytest.mark.parametrize("and_guard", [pytest.param(False, marks=pytest.mark.long), True])
def test_one_that_is_killed_while_its_ray_starts(and_guard: bool) -> None:
    up = UpProcess(free_port(), free_port(), *SETTINGS)
    try:
        kinds = _while_ray_starts(up)
        running = set(kinds)
        if and_guard:
            [guard] = [process for process, kind in kinds.items() if "cluster.ops.left_behind" in kind]
            guard.kill()
    finally:
        up.process.kill()
        up.ended()
    if and_guard:
        [state] = run_state.killed().values()
        assert not state.is_alive() and state.session is not None
        left_behind.end_processes(state)
    _, alive = psutil.wait_procs(list(running), timeout=30)
    assert not alive


def _while_ray_starts(up: UpProcess) -> dict[psutil.Process, str]:
    """All its processes, the first of which is Ray's, once it has noted the session; stopped, for that one would end by
    itself."""
    deadline = time.monotonic() + 60
    while True:
        assert up.process.poll() is None and time.monotonic() < deadline, up.said
        up.process.send_signal(signal.SIGSTOP)
        with contextlib.suppress(psutil.NoSuchProcess):
            kinds = _kinds(up.processes())
            servers = [process for process, kind in kinds.items() if "gcs_server" in kind.split(" ")[0]]
            if servers and any(state.session for state in run_state.running().values()):
                assert not any(kind.split(" ")[0].endswith("/raylet") for kind in kinds.values()), "Ray has started"
                servers[0].send_signal(signal.SIGSTOP)
                return kinds
        up.process.send_signal(signal.SIGCONT)
        time.sleep(0.02)
