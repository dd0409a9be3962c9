"""Mamba states at a cut that is known only after the pass.

The context tower reads a block, and its logits decide how much of the block is accepted. So the pass leaves the states
unchanged and saves its scans' inputs. `settle` then advances the states by the accepted positions, with the bare
recurrence: elementwise, without the products that made its inputs.

M counts the Mamba layers, U the slots of a cache; other letters as in `twotower.model.states`.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from twotower.config import ModelConfig
from twotower.model.transfer import on_device

MOST_NUMBERS = 1 << 24  # states that are advanced together: 64 MiB


class KeptScan(NamedTuple):
    """The scan inputs of one Mamba layer in a pass: the conv's window and new vectors [R,K+L,C]. Also, for each
    position in fp32, the state's decay [R,L,H], gain [R,L,H,P] and b [R,L,G,N]; gain times b is added to the state.
    """

    stream: Tensor
    decay: Tensor
    gain: Tensor
    b: Tensor


class Keeps(Protocol):
    """Takes the scan inputs of each Mamba layer of a pass, in order."""

    def append(self, scan: KeptScan, /) -> None: ...


class KeptScans(NamedTuple):
    """The parts of a KeptScan for all Mamba layers, [M,…] each."""

    stream: Tensor
    decay: Tensor
    gain: Tensor
    b: Tensor

    @classmethod
    def of(cls, layers: Sequence[KeptScan] | None) -> "KeptScans | None":
        """None for a tower without a Mamba layer."""
        return cls(*(torch.stack(parts) for parts in zip(*layers, strict=True))) if layers else None

    @classmethod
    def room(cls, config: ModelConfig, rows: int, width: int, device: torch.device, dtype: torch.dtype) -> "KeptScans":
        """Memory for the scans of a pass of this shape, not set yet. `dtype`: the tower's."""
        each = (len(config.layers_of("M")), rows, width)
        stream = (*each[:2], config.conv_kernel + width, config.conv_channels)
        heads, groups = config.mamba_num_heads, config.n_groups
        scanned = (heads,), (heads, config.mamba_head_dim), (groups, config.ssm_state_size)
        return cls(
            torch.empty(stream, device=device, dtype=dtype),
            *(torch.empty((*each, *shape), device=device) for shape in scanned),
        )

    @property
    def rows(self) -> int:
        return self.stream.shape[1]

    def first(self, rows: int) -> "KeptScans":
        """The scans of the first rows, as views."""
        return KeptScans(*(part[:, :rows] for part in self))


class Keeping:
    """Copies scans into preallocated memory."""

    def __init__(self, room: KeptScans) -> None:
        self._room, self._layer = room, 0

    def append(self, scan: KeptScan, /) -> None:
        for target, part in zip(self._room, scan, strict=True):
            target[self._layer].copy_(part)
        self._layer += 1


def settle(conv_MUKC: Tensor, ssm_MUHPN: Tensor, slots: Sequence[int], scans: KeptScans, cuts: Sequence[int]) -> None:
    """Advance the states of each row's slot by the first `cuts[r]` positions of the saved scans."""
    device, window = ssm_MUHPN.device, conv_MUKC.shape[2]
    slots_R, cuts_R = on_device([list(slots), list(cuts)], device, torch.long)
    newest_RK = cuts_R[:, None] + torch.arange(window, device=device)
    rows_R1 = torch.arange(len(slots), device=device)[:, None]
    conv_MUKC.index_copy_(1, slots_R, scans.stream[:, rows_R1, newest_RK])
    beyond_RL = torch.arange(scans.decay.shape[2], device=device) >= cuts_R[:, None]
    decay_MRLH = scans.decay.masked_fill(beyond_RL[..., None], 1.0)
    gain_MRLHP = scans.gain.masked_fill(beyond_RL[..., None, None], 0.0)
    at_once = max(1, MOST_NUMBERS // (len(slots) * ssm_MUHPN[0, 0].numel()))
    for first in range(0, len(ssm_MUHPN), at_once):
        some = slice(first, first + at_once)
        ssm_mRHPN = ssm_MUHPN[some].index_select(1, slots_R)
        _recur(ssm_mRHPN, decay_MRLH[some], gain_MRLHP[some], scans.b[some], max(cuts))
        ssm_MUHPN[some].index_copy_(1, slots_R, ssm_mRHPN)


def _recur(ssm_MRHPN: Tensor, decay_MRLH: Tensor, gain_MRLHP: Tensor, b_MRLGN: Tensor, length: int) -> None:
    """`h = decay·h + gain ⊗ b` for so many positions, in place. Heads of one group read the same b."""
    groups = b_MRLGN.shape[3]
    state_MRGJPN = ssm_MRHPN.unflatten(2, (groups, -1))
    decay_MRLGJ11 = decay_MRLH.unflatten(3, (groups, -1))[..., None, None]
    gain_MRLGJP1 = gain_MRLHP.unflatten(3, (groups, -1))[..., None]
    b_MRLG11N = b_MRLGN[..., None, None, :]
    for place in range(length):
        state_MRGJPN.mul_(decay_MRLGJ11[:, :, place])
        state_MRGJPN.addcmul_(gain_MRLGJP1[:, :, place], b_MRLG11N[:, :, place])
