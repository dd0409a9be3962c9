"""What a killed `up` leaves is ended, and nothing else is."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from benchmarks.reference.service import free_port
from cluster.cli.main import main
from cluster.ops import left_behind, run_state
from cluster.ops.run_state import RunState

CHECKOUT = Path(__file__).resolve().parents[2]
# Stands for an `up`: starts what writes into the logs of its session, and waits to be killed.
STARTS = """
import contextlib, os, pathlib, subprocess, sys
from cluster.ops import left_behind, run_state
from cluster.ops.run_state import RunState
session, guarded = sys.argv[1:]
state = RunState(os.getpid(), run_state.start_tick(os.getpid()), "127.0.0.1:8000", "", "")
(pathlib.Path(session) / "logs").mkdir(parents=True)
with left_behind.guarded(state) if guarded == "guarded" else contextlib.nullcontext(print) as tell:
    tell(session)
    with open(f"{session}/logs/driver.log", "w") as own, open(f"{session}/logs/worker.out", "w") as log:
        sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
        sleeper = subprocess.Popen(sleep, stdin=subprocess.DEVNULL, stdout=log)
        print(sleeper.pid, flush=True)
        sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@dataclass
class Starting:
    """A process that stands for an `up`, and the one that it has started."""

    process: "subprocess.Popen[str]"
    started: psutil.Process
    state: RunState

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def starting(session: Path, guarded: str = "alone") -> Iterator[Starting]:
    command = [sys.executable, "-c", STARTS, str(session), guarded]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=CHECKOUT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        started = psutil.Process(int(next(line for line in process.stdout if line.strip().isdecimal())))
        born = run_state.start_tick(process.pid)
        try:
            yield Starting(
                process, started, RunState(process.pid, born, "127.0.0.1:8000", "", "", session=str(session))
            )
        finally:
            process.kill()
            if started.is_running():
                started.kill()


@pytest.mark.slow
def test_only_what_is_left_of_a_dead_one_is_ended(tmp_path: Path) -> None:
    with starting(tmp_path / "1") as killed, starting(tmp_path / "11") as alive:
        assert left_behind.processes(killed.state) == []
        killed.kill()
        assert left_behind.processes(killed.state) == [killed.started]
        assert left_behind.processes(alive.state) == []
        assert left_behind.end_processes(alive.state) == [] and alive.started.is_running()
        with (
            open(tmp_path / "1" / "logs" / "worker.out") as log,
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], stdin=log) as reader,
        ):
            assert left_behind.end_processes(killed.state) == [Path(sys.executable).name]
            assert not killed.started.is_running() and alive.started.is_running()
            assert reader.poll() is None, "somebody who reads the logs"
            reader.kill()


def test_a_live_one_is_safe_whatever_its_note_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it passes for a dead one's: its processes are below it."""
    monkeypatch.setattr(RunState, "is_alive", lambda state: False)
    with starting(tmp_path / "1") as alive:
        run_state.write(8000, alive.state)
        assert set(run_state.killed()) == {8000} and _up_that_ends_soon() == 2
        assert alive.started.is_running() and alive.process.poll() is None


@pytest.mark.slow
def test_the_next_up_says_what_it_found_and_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with starting(tmp_path / "1") as killed, starting(tmp_path / "11") as alive:
        run_state.write(8000, killed.state)
        run_state.write(8001, alive.state)
        killed.kill()
        assert set(run_state.running()) == {8001}, "others leave the note to the next `up`"
        assert _up_that_ends_soon() == 2
        said = capsys.readouterr().err
        words = f"the `up` on http://127.0.0.1:8000 (pid {killed.process.pid}) was killed; cleared: its note, 1 process"
        assert f"{words} (" in said and said.count("was killed") == 1
        assert not killed.started.is_running() and alive.started.is_running()
        assert not run_state.killed() and set(run_state.running()) == {8001}


def test_a_killed_one_that_had_joined_a_ray_may_have_left_its_application(capsys: pytest.CaptureFixture[str]) -> None:
    run_state.write(8000, RunState(os.getpid(), 1, "127.0.0.1:8000", "", "", joined="10.0.0.1:6379"))
    assert _up_that_ends_soon() == 2
    said = capsys.readouterr().err
    assert "its application may still run on the Ray at 10.0.0.1:6379; --address with --replace ends it" in said


def _up_that_ends_soon() -> int:
    """It looks for what was killed before it looks at its checkpoint."""
    settings = ["model.checkpoint=/no/such", f"ingress.http_port={free_port()}", f"ingress.grpc_port={free_port()}"]
    return main(["up", *(word for setting in settings for word in ("--set", setting))])


@pytest.mark.slow
def test_a_guard_ends_what_does_not_end_by_itself(tmp_path: Path) -> None:
    with starting(tmp_path / "1", "guarded") as killed:
        [guard] = [child for child in psutil.Process(killed.process.pid).children() if child != killed.started]
        killed.kill()
        _, alive = psutil.wait_procs([killed.started, guard], timeout=30)
        assert not alive
