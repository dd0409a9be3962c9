"""Runs parts of the tests: `alone` (without a cluster), `cluster` (those that start a Ray), `slow` (slow ones that
start none). Of several parts the first has the machine, and the others take what time it leaves. A few tests that fail
are run again, with nothing beside them.

Several run at a time on two cores, some kill processes and wait for what follows. What fails twice is wrong. What fails
once is named at the end, for somebody to look at.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

MOST = 3  # More failures than these have one cause, which a second run only hides.
_SOME_FAILED = 1  # pytest's status; others say that it was stopped or could not begin
_TREE = Path(__file__).resolve().parent.parent
_CACHE = _TREE / ".pytest_cache"
# Which tests, how many workers and how they share them. Slow ones, and those on a local Ray, stay together by files,
# because those of a file share what they loaded or started. tests/conftest.py puts files with a Ray in an order that
# keeps their workers busy to the end. These wait for most of their time, so there are more of them than cores. (`--dist
# loadgroup` does nothing: xdist 3.8 cannot rename this pytest's tests.)
PARTS = {
    "alone": ("not ray and not slow and not long and not kernels", 2, ("--dist", "worksteal")),
    "cluster": ("ray and not long and not kernels", 3, ("--dist", "loadfile", "--no-loadscope-reorder")),
    "slow": ("slow and not ray and not long and not kernels", 2, ("--dist", "loadfile")),
}
# Beside a Ray, whose tests mostly wait but want the processor at once when they want it. Whoever gets what is left has
# longer for each test.
_NICENESS, _TIMEOUT_S = 5, 900


def main() -> int:
    """Returns pytest's status: the highest of all parts, and of the second run of one that had one."""
    first, *others = [Part(name) for name in sys.argv[1:]]
    for part in others:
        part.start("nice", "-n", str(_NICENESS), more=(f"--timeout={_TIMEOUT_S}",), quiet=True)
    first.start()
    parts = [first, *others]
    ended = [(part, part.ended()) for part in parts]
    return max(_once_more(part, status) for part, status in ended)


def _once_more(part: Part, status: int) -> int:
    failed = part.failed()
    if status != _SOME_FAILED or not 0 < len(failed) <= MOST:
        return status
    print(f"\nOnce more, alone: {', '.join(failed)}", flush=True)
    part.start(again=True)
    again = part.ended()
    for name in sorted(set(failed) - set(part.failed())):
        print(f"Failed beside others and passed alone, look at it: {name}", flush=True)
    return again


class Part:
    """Of the tests, with a memory of its own for what failed."""

    def __init__(self, name: str) -> None:
        self.name, self._cache = name, _CACHE / name
        shutil.rmtree(self._cache, ignore_errors=True)
        self._running: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    def start(self, *before: str, more: tuple[str, ...] = (), again: bool = False, quiet: bool = False) -> None:
        """`before`: what pytest's command is given to. `quiet`: its output comes when it has ended."""
        which, workers, share = PARTS[self.name]
        how = ("--last-failed",) if again else ("--numprocesses", str(workers), *share)
        kept = ("-o", f"cache_dir={self._cache}", "-m", which)
        command = [*before, sys.executable, "-m", "pytest", "--quiet", *kept, *how, *more]
        self._said = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115  # until it has ended
        self._running = subprocess.Popen(
            command, cwd=_TREE, env=environment(), stdout=self._said, stderr=subprocess.STDOUT if quiet else None
        )

    def ended(self) -> int:
        """Waits for it, and shows what it said. Its status."""
        assert self._running is not None
        status = self._running.wait()
        if self._said is not None:
            self._said.seek(0)
            print(f"\nBeside it, the part `{self.name}`:", flush=True)
            shutil.copyfileobj(self._said, sys.stdout.buffer)
            sys.stdout.flush()
            self._said.close()
            self._said = None
        return status

    def failed(self) -> list[str]:
        """The tests that failed when they ran last, by pytest's names."""
        kept = self._cache / "v" / "cache" / "lastfailed"
        return sorted(json.loads(kept.read_text(encoding="utf-8"))) if kept.exists() else []


def environment() -> dict[str, str]:
    """Ours, but that bytecode is kept: hundreds of processes of these tests would compile our modules again."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


if __name__ == "__main__":
    sys.exit(main())
