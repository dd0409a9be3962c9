"""Checks room for our own Ray's files before it starts: without room Ray logs without end."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from twotower.errors import ConfigError, Unavailable

LOG_BYTES = 64 * 2**20
SHARED_MEMORY = Path("/dev/shm")


def ray_directory() -> Path:
    """Where Ray puts logs and sockets, by its own rule."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def check_room(object_store_bytes: int, free_bytes: Callable[[Path], int] | None = None) -> None:
    """Raises ConfigError if Ray cannot write, and Unavailable if its files do not fit."""
    free_bytes = free_bytes or _free_bytes
    directory = ray_directory()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ConfigError(f"{directory}: Ray cannot write its logs there; set RAY_TMPDIR to a directory of yours")
    free, shared = free_bytes(existing), free_bytes(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else 0
    needs = f"{_mib(LOG_BYTES)} for Ray's logs"
    wanted = LOG_BYTES
    if shared < object_store_bytes:  # Ray's rule
        wanted += object_store_bytes
        needs += f" and {_mib(object_store_bytes)} for its object store ({SHARED_MEMORY} has {_mib(shared)} free)"
    if free < wanted:
        raise Unavailable(
            f"{directory}: {_mib(free)} free, wanted {needs}; make room, or set RAY_TMPDIR to a directory that has it"
        )


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


def _mib(number: int) -> str:
    return f"{number / 2**20:.0f} MiB"
