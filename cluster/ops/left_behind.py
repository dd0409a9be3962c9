"""What an `up` that was killed leaves behind: processes of its Ray that have not noticed, and its note.

A guard process waits for the end of the `up` and ends them; where the guard was killed too, the next `up` does.
That a process is of that Ray is proved by what it has open: logs of the Ray's session, and to write into them.
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

_BY_ITSELF_S = 5.0  # so long processes of a Ray that has ended may take to end too
_KILLED_S = 10.0


def processes(state: RunState) -> list[psutil.Process]:
    """What is left of the Ray that the `up` of this note has started; none before that `up` is dead."""
    return [process for process in psutil.process_iter() if _is_left(process, state)]


def end_processes(state: RunState, by_itself_s: float = 0.0) -> list[str]:
    """Kills what is left, and what has not ended by itself in so many seconds. The titles of what was killed."""
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
    """A live `up` and what is below it are not left, whatever its note says."""
    try:
        return (
            process.uids().real == os.getuid()
            and state.session is not None
            and process.status() != psutil.STATUS_ZOMBIE
            and any(
                file.mode != "r" and file.path.startswith(f"{state.session}/logs/") for file in process.open_files()
            )
            and os.path.samefile(f"/proc/{process.pid}/ns/pid", "/proc/self/ns/pid")  # a container counts anew
            and state.pid not in (process.pid, *(parent.pid for parent in process.parents()))
        )
    except (psutil.Error, OSError):
        return False


@contextlib.contextmanager
def guarded(state: RunState) -> Iterator[Callable[[str], None]]:
    """Runs a process that outlives this one, whatever ends it, until nothing of its Ray is left. It is to be told the
    session's directory, once."""
    command = [sys.executable, "-m", "cluster.ops.left_behind", str(state.pid), str(state.started)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C and the end of a terminal go to all of one
    ) as guard:  # closes its input in the end, and waits for it

        def tell(session: str) -> None:
            assert guard.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # killed: the next `up` does its work
                print(session, file=guard.stdin, flush=True)

        yield tell


def _guard(state: RunState) -> None:
    """The input ends when the `up` does."""
    session = sys.stdin.read().strip()
    end_processes(replace(state, session=session or None), _BY_ITSELF_S)


if __name__ == "__main__":
    _guard(RunState(int(sys.argv[1]), int(sys.argv[2]), "", "", ""))
