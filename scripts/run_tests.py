"""Runs a part of the tests: `alone` (without a cluster) or `cluster` (those that start a Ray, and slow ones). A few
that fail are run again, with nothing beside them.

Tests run two at a time on two cores, some kill processes and wait for what follows. What fails twice is wrong. What
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
_CACHE = _TREE / ".pytest_cache"
# Which tests, and how the two workers share them. On a local Ray the tests of a file stay together, because they share
# what they started. The file tests/conftest.py orders the files so that both workers are busy to the end. (`--dist
# loadgroup` does nothing: xdist 3.8 cannot rename this pytest's tests.)
PARTS = {
    "alone": ("not ray and not slow and not long and not kernels", ("--dist", "worksteal")),
    "cluster": ("(ray or slow) and not long and not kernels", ("--dist", "loadfile", "--no-loadscope-reorder")),
}


def main() -> int:
    """Returns pytest's status: of the second run, where there was one."""
    part = Part(sys.argv[1])
    status = part.run("--numprocesses", "2", *PARTS[part.name][1])
    failed = part.failed()
    if status != _SOME_FAILED or not 0 < len(failed) <= MOST:
        return status
    print(f"\nOnce more, alone: {', '.join(failed)}", flush=True)
    again = part.run("--last-failed")
    for name in sorted(set(failed) - set(part.failed())):
        print(f"Failed beside others and passed alone, look at it: {name}", flush=True)
    return again


class Part:
    """Of the tests, with a memory of its own for what failed."""

    def __init__(self, name: str) -> None:
        self.name, self._cache = name, _CACHE / name
        shutil.rmtree(self._cache, ignore_errors=True)

    def run(self, *arguments: str) -> int:
        kept = ("-o", f"cache_dir={self._cache}", "-m", PARTS[self.name][0])
        return subprocess.run([sys.executable, "-m", "pytest", "--quiet", *kept, *arguments], cwd=_TREE).returncode

    def failed(self) -> list[str]:
        """The tests that failed when they ran last, by pytest's names."""
        kept = self._cache / "v" / "cache" / "lastfailed"
        return sorted(json.loads(kept.read_text(encoding="utf-8"))) if kept.exists() else []


if __name__ == "__main__":
    sys.exit(main())
