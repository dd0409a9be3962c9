"""The result as markdown, written anew after every part, so that a run that is cut short leaves what it had."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu_parts.site import Site

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "mamba-ssm", "causal-conv1d", "flash-attn")


class Report:
    """Collects parts; writes them to `output`, or prints each one."""

    def __init__(self, site: Site, command: str, output: Path | None) -> None:
        self._output = output
        self._parts: list[str] = []
        self.faults: list[str] = []
        title = "# Towers and exchange on a GPU"
        if site.tiny:
            title += "\n\n**A tiny model: this shows that everything runs; no time in it means anything.**"
        self.add(title + "\n\n" + _setup(site, command))

    def add(self, part: str) -> None:
        self._parts.append(part)
        if self._output is None:
            print(part, end="\n\n", flush=True)
        else:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._output.write_text("\n\n".join(self._parts) + "\n", encoding="utf-8")

    def fault(self, what: str) -> None:
        """A number that is not what it should be, whatever the times say."""
        self.faults.append(what)

    def close(self) -> None:
        """The verdict."""
        lines = [f"- {fault}" for fault in self.faults] or ["None: every number that was checked is right."]
        self.add("## Faults\n\n" + "\n".join(lines))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _setup(site: Site, command: str) -> str:
    hardware = torch.cuda.get_device_name(site.device) if site.device.type == "cuda" else "CPU"
    if site.device.type == "cuda":
        hardware += f", {torch.cuda.get_device_properties(site.device).total_memory / 2**30:.0f} GiB"
    lines = {
        "device": hardware,
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "software": ", ".join([f"Python {platform.python_version()}", *_versions(), f"CUDA {torch.version.cuda}"]),
        "commit": _commit(),
        "command": f"`{command}`",
        "model": f"`{site.config.hybrid_override_pattern}`, hidden {site.config.hidden_size}, random weights",
        "behind every row": f"{site.cached} cached tokens",
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _versions() -> list[str]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found


def _commit() -> str:
    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    dirty = " with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short=12", "HEAD") or "unknown (no git here)") + dirty
