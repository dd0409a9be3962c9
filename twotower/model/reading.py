"""The plan of loading a tower, made from headers before tensors are read, and the reading by several threads.

Knows files and tensors, no tower: `loading.py` says which tensors a tower wants and where they go.
"""

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from twotower.errors import CheckpointError
from twotower.model.checkpoint import BYTES_OF, Checkpoint, Reader, Stored

logger = logging.getLogger(__name__)

READERS = 4
"""Threads at most: few disks give more to more, and each holds one tensor in host memory."""
_BIG_BYTES = 1 << 30  # smaller plans are read by one thread, without an estimate of the time
_RUN_BYTES = 1 << 29  # bytes that one thread takes at a time
_SAMPLE_BYTES = 8 << 20
_GB = 10**9
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Target:
    """The required shape and dtype of a tensor in the files, and its destination."""

    shape: tuple[int, ...]
    kinds: tuple[str, ...]
    put: Callable[[Tensor], object]


@dataclass(frozen=True)
class Plan:
    """The tensors that loading `what` reads, shard by shard. `of_shards`: the number of all shards of
    the checkpoint.
    """

    what: str
    tensors: tuple[Stored, ...]
    of_shards: int

    @property
    def nbytes(self) -> int:
        """Bytes to read from files."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def shards(self) -> tuple[Path, ...]:
        """The shards that are opened."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors))

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor, which a reader holds in host memory."""
        return max(tensor.nbytes for tensor in self.tensors)

    @property
    def readers(self) -> int:
        """The number of reading threads."""
        return 1 if self.nbytes < _BIG_BYTES else min(READERS, len(list(self.runs())))

    def runs(self) -> Iterator[list[Stored]]:
        """Runs of neighbouring tensors in one shard, each read by one thread."""
        for _, shard in groupby(self.tensors, key=lambda tensor: tensor.file):
            run: list[Stored] = []
            nbytes = 0
            for tensor in shard:
                if run and nbytes + tensor.nbytes > _RUN_BYTES:
                    yield run
                    run, nbytes = [], 0
                run.append(tensor)
                nbytes += tensor.nbytes
            yield run

    def __str__(self) -> str:
        shards = f"{len(self.shards)} of {self.of_shards} shards"
        return f"{self.what}: {self.nbytes / _GB:.2f} GB in {len(self.tensors)} tensors, {shards}"


def planned(checkpoint: Checkpoint, what: str, targets: Mapping[str, Target], elsewhere: Callable[[str], bool]) -> Plan:
    """Check the files' headers against a tower's targets. `elsewhere`: whether a tensor without a target still belongs
    to the checkpoint. Reads no tensor. Raises CheckpointError naming the first wrong one and its file.
    """
    missing = sorted(set(targets) - set(checkpoint.files))
    if missing:
        raise CheckpointError(f"{checkpoint.directory}: tensor {missing[0]!r} is missing{_more(missing)}")
    extra = sorted(name for name in checkpoint.files if name not in targets and not elsewhere(name))
    if extra:
        raise CheckpointError(f"{checkpoint.files[extra[0]]}: unexpected tensor {extra[0]!r}{_more(extra)}")
    with checkpoint.reading() as reader:
        tensors = [reader.stored(name) for name in sorted(targets, key=lambda name: str(checkpoint.files[name]))]
    for tensor in tensors:
        target = targets[tensor.name]
        if tensor.shape != target.shape:
            got, wanted = list(tensor.shape), list(target.shape)
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r}: got shape {got}, wanted {wanted}")
        if tensor.kind not in target.kinds or tensor.kind not in BYTES_OF:
            wanted_kinds = " or ".join(target.kinds)
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r}: got dtype {tensor.kind}, wanted {wanted_kinds}"
            )
    return Plan(what, tuple(tensors), len(set(checkpoint.files.values())))


def read(checkpoint: Checkpoint, plan: Plan, targets: Mapping[str, Target], progress: bool) -> None:
    """Read every tensor of the plan to its destination. Each reader holds one tensor at a time. Logs an estimate of the
    time; with `progress` also on stderr. Raises the first error of any reader, once all of them have stopped.
    """
    told = _expected(plan)
    logger.info("%s", told)
    if progress and plan.nbytes >= _BIG_BYTES:
        tqdm.write(told, file=sys.stderr)
    runs, stop, inference = deque(plan.runs()), threading.Event(), torch.is_inference_mode_enabled()
    bar = tqdm(total=plan.nbytes, desc=f"loading {plan.what}", unit="B", unit_scale=True, disable=not progress)
    counting = threading.Lock()

    def work() -> None:
        try:
            with torch.inference_mode(inference), checkpoint.reading() as reader:
                for tensor in _taken(runs, stop):
                    _put(reader, tensor, targets[tensor.name])
                    with counting:
                        bar.update(tensor.nbytes)
        except BaseException:
            stop.set()
            raise

    with bar:
        if plan.readers == 1:
            work()
            return
        with ThreadPoolExecutor(plan.readers, thread_name_prefix="loading") as pool:
            for reader in [pool.submit(work) for _ in range(plan.readers)]:
                reader.result()


def _taken(runs: deque[list[Stored]], stop: threading.Event) -> Iterator[Stored]:
    """One reader: takes the next free run, again and again, until there is none or a reader has failed."""
    while True:
        try:
            run = runs.popleft()
        except IndexError:
            return
        for tensor in run:
            if stop.is_set():
                return
            yield tensor


def _put(reader: Reader, tensor: Stored, target: Target) -> None:
    try:
        target.put(reader.tensor(tensor.name))
    except CheckpointError as error:
        if str(tensor.file) in str(error):
            raise
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r}: {error}") from error


def _expected(plan: Plan) -> str:
    """A line about the plan; for a large one with the expected time at the pace of a sample. If the system has the
    files in memory, the sample comes from memory, too.
    """
    if plan.nbytes < _BIG_BYTES:
        return str(plan)
    runs = list(plan.runs())
    step = max(1, len(runs) // plan.readers)
    began = time.perf_counter()
    with ThreadPoolExecutor(plan.readers) as pool:
        sampled = sum(pool.map(_sample, [run[len(run) // 2].file for run in runs[::step]][: plan.readers]))
    rate = max(1, sampled) / max(time.perf_counter() - began, 1e-9)
    return (
        f"{plan}, by {plan.readers} readers; about {plan.nbytes / rate:.0f} s from disk at {rate / _GB:.2f} GB/s, the "
        f"pace of a sample of {sampled / 2**20:.0f} MiB"
    )


def _sample(file: Path) -> int:
    """Read a part of the middle of a file; returns its bytes."""
    with file.open("rb", buffering=0) as opened:
        middle = os.fstat(opened.fileno()).st_size // 2
        return len(os.pread(opened.fileno(), _SAMPLE_BYTES, middle))


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
