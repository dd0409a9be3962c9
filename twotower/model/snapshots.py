"""Copies of sequences' Mamba states, in the memory of the cache's device or in that of its host."""

import torch
from torch import Tensor

from twotower.model.memory import untouched_zeros


class Snapshots:
    """`count` copies of the conv window and the SSM states of one sequence, in every Mamba layer.

    On the host they are pinned, and a copy either way is queued on the device's current stream like any other work. So
    nobody waits for it, and what is queued later finds it done.
    """

    def __init__(self, count: int, conv: Tensor, ssm: Tensor, on_host: bool = False) -> None:
        """For a cache's `conv` and `ssm`, each [layers, slots, …]. `on_host` means nothing on a CPU."""
        self._conv, self._ssm = conv, ssm
        self.conv, self.ssm = (_kept(count, states, on_host) for states in (conv, ssm))

    def __len__(self) -> int:
        return self.ssm.shape[0]

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.ssm.nbytes

    def save(self, slot: int, snapshot: int) -> None:
        """Copy the states at `slot`."""
        self.conv[snapshot].copy_(self._conv[:, slot], non_blocking=True)
        self.ssm[snapshot].copy_(self._ssm[:, slot], non_blocking=True)

    def load(self, snapshot: int, slot: int) -> None:
        """The states at `slot` are those of the snapshot."""
        self._conv[:, slot].copy_(self.conv[snapshot], non_blocking=True)
        self._ssm[:, slot].copy_(self.ssm[snapshot], non_blocking=True)


def _kept(count: int, states: Tensor, on_host: bool) -> Tensor:
    """[count, layers, …]: a copy is one piece, which alone moves between host and device without a copy besides."""
    shape = (count, states.shape[0], *states.shape[2:])
    if not (on_host and states.device.type == "cuda"):
        return untouched_zeros(shape, states.device, states.dtype)
    return untouched_zeros(shape, torch.device("cpu"), states.dtype).pin_memory()
