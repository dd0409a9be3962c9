"""How much memory a device has left for this process. One that does not fit is refused before anything is loaded."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from twotower.engine.memory import Memory
from twotower.errors import ConfigError

logger = logging.getLogger(__name__)

_GIB, _MIB = 2**30, 2**20
# Beyond the sum. On a GPU: cuBLAS's workspaces, NCCL's buffers, kernels' code, gaps between the allocator's blocks.
# On a CPU: threads' stacks and what Python takes while it loads.
MARGINS = {"cuda": 768 * _MIB, "cpu": 64 * _MIB}
_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2^63


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on the device; None if the system does not say."""
    if device.type != "cuda":
        return free_host_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused


def check_fits(memory: Memory, device: torch.device) -> None:
    """Raises ConfigError, with the sum and what to change, if the device or its host has less free memory."""
    if memory.host:
        _check_host(memory.host)
    free = free_bytes(device)
    if free is None:
        logger.info("free memory of %s: not known on this system", device)
        return
    margin = MARGINS[device.type]
    wanted = memory.total + memory.passing + margin
    logger.info("%s has %.2f GiB free, %.2f GiB are wanted", device, free / _GIB, wanted / _GIB)
    if wanted > free:
        parts = " + ".join(
            f"{name} {nbytes / _GIB:.2f}" for name, nbytes in (memory.parts | {"margin": margin}).items()
        )
        raise ConfigError(
            f"memory: got {free / _GIB:.2f} GiB free on {device}, wanted {wanted / _GIB:.2f} GiB = {parts}; change "
            "max_sequences, max_sequence_length, cache_tokens, dtype (bfloat16), placement (split) or device"
        )


def _check_host(wanted: int) -> None:
    """Pinned memory cannot be swapped out: what is too much of it would have the system kill processes."""
    free = free_host_bytes()
    wanted += MARGINS["cpu"]
    if free is not None and wanted > free:
        raise ConfigError(
            f"prefix_cache_in: host, got {free / _GIB:.2f} GiB free there, wanted {wanted / _GIB:.2f} GiB (pinned "
            "memory comes in powers of two); change prefix_cache_bytes"
        )


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """The smaller of the kernel's available memory and the rest within the limits of this process's cgroups."""
    return min((*_available(root), *_left_by_cgroups(root)), default=None)


def _available(root: Path) -> Iterator[int]:
    for name, value in _pairs(root / "proc/meminfo"):
        if name == "MemAvailable:":
            yield value * 1024


def _left_by_cgroups(root: Path) -> Iterator[int]:
    """The rest within each limit, from this process's group up to the top. In a container the top is its own group."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory == top or top in directory.parents:
                yield from _left_by(directory, *names)


def _left_by(directory: Path, limit_file: str, usage_file: str, prefix: str) -> Iterator[int]:
    """Limit less usage; file pages count as free, because the kernel takes them back."""
    limit, usage = _number(directory / limit_file), _number(directory / usage_file)
    if limit is None or usage is None or limit >= _NO_LIMIT:
        return
    files = {f"{prefix}active_file", f"{prefix}inactive_file"}
    cached = sum(value for name, value in _pairs(directory / "memory.stat") if name in files)
    yield max(0, limit - usage + cached)


def _number(file: Path) -> int | None:
    """None if there is no such file, or if it says `max`."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _pairs(file: Path) -> Iterator[tuple[str, int]]:
    """The lines of a file that are a name and a number, whatever follows."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name, _, rest = line.partition(" ")
        number = rest.split()
        if number and number[0].isdigit():
            yield name, int(number[0])
