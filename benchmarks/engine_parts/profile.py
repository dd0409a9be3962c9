"""Where an engine's thread spends its time, by py-spy from outside: sampled lines, most first."""

import asyncio
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_RATE = 200
_ENGINE_THREAD = "engine/runner.py"
_TOP = 14


@dataclass(frozen=True, slots=True)
class Profile:
    """Shares of the engine thread's samples by the function of ours they were in, torch's work included."""

    samples: int
    ours: tuple[tuple[str, float], ...]


def profiler() -> str | None:
    """py-spy's path, beside this interpreter or on PATH."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


async def profile(pid: int, seconds: int) -> Profile | None:
    """Sample a process of ours for a while; None where py-spy is missing or may not look."""
    tool = profiler()
    if tool is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "stacks"
        command = ["record", "--pid", str(pid), "--duration", str(seconds), "--rate", str(_RATE), "--nonblocking"]
        process = await asyncio.create_subprocess_exec(
            tool, *command, "--format", "raw", "--output", str(output),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        status = await process.wait()
        if status or not output.exists():
            return None
        return summarise(output.read_text(encoding="utf-8"))


def summarise(stacks: str) -> Profile:
    """Collapsed stacks, `outermost;…;innermost count` a line, to shares by our innermost function."""
    ours: Counter[str] = Counter()
    samples = 0
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        if _ENGINE_THREAD not in stack:
            continue
        samples += int(count)
        mine = [frame for frame in stack.split(";") if "twotower/" in frame or "actors/" in frame]
        ours[_place(mine[-1])] += int(count)
    return Profile(samples, tuple((name, count / samples) for name, count in ours.most_common(_TOP)))


def _place(frame: str) -> str:
    """`function (path/of/file.py:12)` without the line, the path from the package on."""
    name, _, where = frame.partition(" (")
    path = where.rpartition(":")[0]
    for package in ("twotower/", "actors/"):
        _, found, after = path.rpartition(package)
        if found:
            return f"{found}{after} {name}"
    return f"{path} {name}"
