"""The remains of a killed `up`: processes of its Ray that have not noticed, and its note.

A guard process waits for the end of the `up` and ends them; if the guard was killed, too, the next `up` does. A process
belongs to that Ray if it has a log of the Ray's session open for writing.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil

from cluster.ops.run_state import RunState

_BY_ITSELF_S = 5.0  # seconds that processes of an ended Ray may take to end
_KILLED_S = 10.0


def processes(state: RunState) -> list[psutil.Process]:
    """The remaining processes of the Ray that this note's `up` has started; none before that `up` is dead."""
    return [process for process in psutil.process_iter() if _is_left(process, state)]


def end_processes(state: RunState, by_itself_s: float = 0.0) -> list[str]:
    """Kills remaining processes that do not end within so many seconds. Returns the killed processes' titles."""
    psutil.wait_procs(processes(state), timeout=by_itself_s)
    killed = dict[psutil.Process, str]()
    for process in processes(state):
        with contextlib.suppress(psutil.Error):
            title = process.cmdline()[:1] or [process.name()]
            process.kill()  # which looks at the start time first
            killed[process] = Path(title[0].strip()).name
    psutil.wait_procs(list(killed), timeout=_KILLED_S)
    return sorted(killed.values())


def _is_left(process: psutil.Process, state: RunState) -> bool:
    """A live `up` and its children are not remains, whatever the note says."""
    try:
        return (
            process.uids().real == os.getuid()
            and state.session is not None
            and process.status() != psutil.STATUS_ZOMBIE
            and any(
                file.mode != "r" and file.path.startswith(f"{state.session}/logs/") for file in process.open_files()
            )
            and os.path.samefile(f"/proc/{process.pid}/ns/pid", "/proc/self/ns/pid")  # a container counts pids anew
            and state.pid not in (process.pid, *(parent.pid for parent in process.parents()))
        )
    except (psutil.Error, OSError):
        return False


@contextlib.contextmanager
def guarded(state: RunState) -> Iterator[Callable[[str], None]]:
    """Runs a guard process that outlives this one until nothing of its Ray is left. Tell it the session's directory
    once.
    """
    command = [sys.executable, "-m", "cluster.ops.left_behind", str(state.pid), str(state.started)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C and a terminal's end reach its whole process group
    ) as guard:  # closes its input at the end, and waits for it

        def tell(session: str) -> None:
            assert guard.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # killed: the next `up` does its work
                print(session, file=guard.stdin, flush=True)

        yield tell


def _guard(state: RunState) -> None:
    """The guard's input ends with the `up`."""
    session = sys.stdin.read().strip()
    end_processes(replace(state, session=session or None), _BY_ITSELF_S)


if __name__ == "__main__":
    _guard(RunState(int(sys.argv[1]), int(sys.argv[2]), "", "", ""))
