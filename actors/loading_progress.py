"""Logs the progress of a tower's loading: a large tower takes minutes, in which its process logs nothing else."""

import logging
import threading
from dataclasses import dataclass, field, fields

import torch

from twotower.model.checkpoint import Checkpoint, Reader
from twotower.model.loading import plan_of
from twotower.model.tower import ContextTower, DenoiserTower

logger = logging.getLogger(__name__)

_QUICK_BYTES = 256 * 2**20


class LoadingProgress:
    """Counts the tensors of a tower as readers read them, and logs every tenth part."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._read = name, total, 0
        self._counting = threading.Lock()

    def add(self) -> None:
        with self._counting:
            before, self._read = self._read, self._read + 1
            now = self._read
        if 10 * now // self._total > 10 * before // self._total:
            percent = 100 * now // self._total
            logger.info("loading the %s: %d of %d tensors (%d %%)", self._name, now, self._total, percent)


@dataclass(frozen=True)
class ReportedCheckpoint(Checkpoint):
    """A checkpoint that reports every tensor read from it."""

    progress: LoadingProgress = field(kw_only=True)

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


def reported(checkpoint: Checkpoint, kind: type[ContextTower] | type[DenoiserTower]) -> Checkpoint:
    """The checkpoint for loading one tower of this kind; it reports progress if the tower is large. Raises
    CheckpointError if it has no such tower.
    """
    plan = plan_of(checkpoint, kind)
    if plan.nbytes <= _QUICK_BYTES:
        return checkpoint
    held = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    return ReportedCheckpoint(**held, progress=LoadingProgress(plan.what, len(plan.tensors)))
