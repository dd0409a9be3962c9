"""Runs the tests that start a Ray, and slow ones. A few that fail are run again, with nothing beside them.

These tests kill processes and wait for what follows, two files at a time on two cores. What fails twice is wrong. What
fails once is named at the end, for somebody to look at.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

MOST = 3  # More failures than these have one cause, which a second run only hides.
_SOME_FAILED = 1  # pytest's status; others say that it was stopped or could not begin
_TREE = Path(__file__).resolve().parent.parent
_CACHE = _TREE / ".pytest_cache" / "live"
_PYTEST = (sys.executable, "-m", "pytest", "--quiet", "-o", f"cache_dir={_CACHE}")
_WHICH = ("-m", "(ray or slow) and not long and not kernels")
# On a local Ray the tests of a file stay together, because they share what they started. tests/conftest.py puts the
# files in an order that keeps both workers busy to the end. (`--dist loadgroup` does nothing: xdist 3.8 cannot rename
# this pytest's tests.)
_SIDE_BY_SIDE = ("--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder")


def main() -> int:
    """Returns pytest's status: of the second run, where there was one."""
    shutil.rmtree(_CACHE, ignore_errors=True)
    status = _run(*_SIDE_BY_SIDE, *_WHICH)
    failed = _failed()
    if status != _SOME_FAILED or not 0 < len(failed) <= MOST:
        return status
    print(f"\nOnce more, alone: {', '.join(failed)}", flush=True)
    again = _run("--last-failed", *_WHICH)
    for name in sorted(set(failed) - set(_failed())):
        print(f"Failed beside others and passed alone, look at it: {name}", flush=True)
    return again


def _run(*arguments: str) -> int:
    return subprocess.run([*_PYTEST, *arguments], cwd=_TREE).returncode


def _failed() -> list[str]:
    """The tests that failed when they ran last, by pytest's names."""
    kept = _CACHE / "v" / "cache" / "lastfailed"
    return sorted(json.loads(kept.read_text(encoding="utf-8"))) if kept.exists() else []


if __name__ == "__main__":
    sys.exit(main())
