"""How far a tower's loading is, in the log: a large one takes minutes, in which its process says nothing else."""

import logging
from dataclasses import dataclass

import torch

from twotower.model.checkpoint import Checkpoint, Reader
from twotower.model.loading import stored_tensors
from twotower.model.tower import ContextTower, DenoiserTower

logger = logging.getLogger(__name__)

_QUICK_BYTES = 256 * 2**20


class LoadingProgress:
    """Counts the tensors of a tower as they are read, and logs every tenth part."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._read = name, total, 0

    def add(self) -> None:
        before, self._read = self._read, self._read + 1
        if 10 * self._read // self._total > 10 * before // self._total:
            percent = 100 * self._read // self._total
            logger.info("loading the %s: %d of %d tensors (%d %%)", self._name, self._read, self._total, percent)


@dataclass(frozen=True)
class ReportedCheckpoint(Checkpoint):
    """A checkpoint that tells of every tensor that was read from it."""

    progress: LoadingProgress

    def reading(self) -> Reader:
        return _ReportingReader(self, self.progress)


class _ReportingReader(Reader):
    def __init__(self, checkpoint: Checkpoint, progress: LoadingProgress) -> None:
        super().__init__(checkpoint)
        self._progress = progress

    def tensor(self, name: str) -> torch.Tensor:
        tensor = super().tensor(name)
        self._progress.add()
        return tensor


def reported(checkpoint: Checkpoint, kind: type[ContextTower] | type[DenoiserTower], dtype: torch.dtype) -> Checkpoint:
    """The checkpoint to load one tower of this kind from: one that reports where the tower is large."""
    with torch.device("meta"):
        tensors = [tensor for _, tensor in stored_tensors(kind(checkpoint.config), checkpoint.layout)]
    if sum(tensor.numel() for tensor in tensors) * dtype.itemsize <= _QUICK_BYTES:
        return checkpoint
    name = "context tower" if kind is ContextTower else "denoiser tower"
    return ReportedCheckpoint(
        checkpoint.directory,
        checkpoint.config,
        checkpoint.layout,
        checkpoint.files,
        LoadingProgress(name, len(tensors)),
    )
