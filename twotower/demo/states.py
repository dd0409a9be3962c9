"""The towers' states in training: the same `LayerStates` seam as in serving, kept whole so that gradients and
block boundaries are at hand.

Shape suffixes as in `twotower.model.states`; further: B blocks in a denoiser batch, Z boundaries of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.config import ModelConfig
from twotower.model.rescan import KeptScan
from twotower.model.states import WithoutPages
from twotower.model.tower import ContextTower


class FromNothing(WithoutPages):
    """A causal pass over whole rows from empty states: the context stage."""

    lengths_R = None
    starts_R = None
    updates = False
    kept = None

    def __init__(self, config: ModelConfig, rows: int, length: int, device: torch.device) -> None:
        self.mask_RLT = torch.ones(length, length, dtype=torch.bool, device=device).tril().expand(rows, -1, -1)
        self._zeros = _zero_states(config, rows, device)

    def mamba(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._zeros

    def put_mamba(self, layer: int, conv_RKC: Tensor, ssm_RHPN: Tensor) -> None:
        raise AssertionError("the context stage keeps no states")

    def keys_values(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> tuple[Tensor, Tensor]:
        return keys_RLSE, values_RLSE


class Reading(WithoutPages):
    """The frozen context tower's states while it reads prompts, then answer blocks; kept at every block boundary.

    Boundary z lies right before block z.
    """

    starts_R = None
    updates = True

    def __init__(self, config: ModelConfig, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._zeros = _zero_states(config, rows, device)
        self._boundaries: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self._readable_RT = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self._piece_ends: list[int] = []
        self.lengths_R: Tensor | None = None
        self.kept: list[KeptScan] | None = None
        self.mask_RLT = self._readable_RT.unsqueeze(1)

    @torch.no_grad()
    def read(self, tower: ContextTower, tokens_RL: Tensor, lengths_R: Tensor | None = None) -> Tensor:
        """Extend all rows by one piece, such as the prompts. Returns hidden states [R,L,D]."""
        rows, length = tokens_RL.shape
        offsets_L = torch.arange(length, device=self._device)
        real_RL = torch.ones_like(tokens_RL, dtype=torch.bool)
        if lengths_R is not None:
            real_RL = offsets_L < lengths_R[:, None]
        causal_RLL = (offsets_L[:, None] >= offsets_L).expand(rows, -1, -1)
        before_RLT = self._readable_RT[:rows, None].expand(-1, length, -1)
        self.lengths_R, self.mask_RLT = lengths_R, torch.cat([before_RLT, causal_RLL], dim=2)
        hidden_RLD: Tensor = tower(tokens_RL, self)
        self._readable_RT = torch.cat([self._readable_RT, _pad_rows(real_RL, self._rows)], dim=1)
        self._piece_ends.append(self._readable_RT.shape[1])
        return hidden_RLD

    def read_blocks(self, tower: ContextTower, tokens_RZW: Tensor) -> None:
        """Extend all rows by several blocks in one pass. What a row holds behind its own last block is never looked at.

        The pass keeps what its scans read; the states at the boundaries inside follow from that.
        """
        self.kept = []
        self.read(tower, tokens_RZW.flatten(1))
        begin = self._piece_ends.pop() - tokens_RZW[0].numel()
        blocks, width = tokens_RZW.shape[1:]
        self._piece_ends += [begin + width * (block + 1) for block in range(blocks)]
        for boundaries, scan in zip(self._boundaries.values(), self.kept, strict=True):
            boundaries += _states_at_ends(boundaries[-1], scan, blocks, width)
        self.kept = None

    def mamba(self, layer: int) -> tuple[Tensor, Tensor]:
        rows = self.mask_RLT.shape[0]
        conv_RKC, ssm_RHPN = self._boundaries[layer][-1] if layer in self._boundaries else self._zeros
        return conv_RKC[:rows], ssm_RHPN[:rows]

    def put_mamba(self, layer: int, conv_RKC: Tensor, ssm_RHPN: Tensor) -> None:
        self._boundaries.setdefault(layer, []).append((conv_RKC, ssm_RHPN))

    def keys_values(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> tuple[Tensor, Tensor]:
        rows = keys_RLSE.shape[0]
        new = _pad_rows(keys_RLSE, self._rows), _pad_rows(values_RLSE, self._rows)
        if layer in self._keys_values:
            old = self._keys_values[layer]
            new = torch.cat([old[0], new[0]], dim=1), torch.cat([old[1], new[1]], dim=1)
        self._keys_values[layer] = new
        return new[0][:rows], new[1][:rows]

    def blocks(self, rows_B: Tensor, boundaries_B: Tensor, block_size: int) -> BlockStates:
        """The denoiser's view of block `boundaries_B` of row `rows_B`."""
        return BlockStates(self, rows_B, boundaries_B, block_size)

    def boundary_states(self, layer: int, rows_B: Tensor, boundaries_B: Tensor) -> tuple[Tensor, Tensor]:
        """Conv windows [B,K,C] and SSM states [B,H,P,N] at the given boundaries."""
        convs = [_pad_rows(conv, self._rows) for conv, _ in self._boundaries[layer]]
        ssms = [_pad_rows(ssm, self._rows) for _, ssm in self._boundaries[layer]]
        return torch.stack(convs)[boundaries_B, rows_B], torch.stack(ssms)[boundaries_B, rows_B]

    def readable(self, rows_B: Tensor, boundaries_B: Tensor) -> Tensor:
        """Which of the T context positions lie before each boundary [B,T]."""
        ends_Z = torch.tensor(self._piece_ends, device=self._device)
        positions_T = torch.arange(self._piece_ends[-1], device=self._device)
        return self._readable_RT[rows_B] & (positions_T < ends_Z[boundaries_B][:, None])

    def context_keys_values(self, layer: int, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B,T,S,E] of all that was read."""
        keys, values = self._keys_values[layer]
        return keys[rows_B], values[rows_B]


class BlockStates(WithoutPages):
    """What the denoiser sees of a block: context before it, the block itself both ways. Read-only."""

    lengths_R = None
    starts_R = None
    updates = False
    kept = None

    def __init__(self, reading: Reading, rows_B: Tensor, boundaries_B: Tensor, block_size: int) -> None:
        self._reading, self._rows_B, self._boundaries_B = reading, rows_B, boundaries_B
        before_BT = reading.readable(rows_B, boundaries_B)
        readable_BT = torch.cat([before_BT, before_BT.new_ones(len(rows_B), block_size)], dim=1)
        self.mask_RLT = readable_BT[:, None].expand(-1, block_size, -1)

    def mamba(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._reading.boundary_states(layer, self._rows_B, self._boundaries_B)

    def put_mamba(self, layer: int, conv_RKC: Tensor, ssm_RHPN: Tensor) -> None:
        raise AssertionError("the denoiser writes no states")

    def keys_values(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> tuple[Tensor, Tensor]:
        keys_BTSE, values_BTSE = self._reading.context_keys_values(layer, self._rows_B)
        return torch.cat([keys_BTSE, keys_RLSE], dim=1), torch.cat([values_BTSE, values_RLSE], dim=1)


def _states_at_ends(
    before: tuple[Tensor, Tensor], scan: KeptScan, blocks: int, width: int
) -> list[tuple[Tensor, Tensor]]:
    """Conv window and SSM state at the end of each of the blocks that a pass read, in closed form inside a block."""
    conv_RKC, ssm_RHPN = before
    groups, window = scan.b.shape[2], conv_RKC.shape[1]
    decay_RZWH = scan.decay.unflatten(1, (blocks, width))
    from_here_RZWH = decay_RZWH.flip(2).cumprod(2).flip(2)
    to_end_RZWH = torch.cat([from_here_RZWH[:, :, 1:], torch.ones_like(decay_RZWH[:, :, :1])], dim=2)
    gain_RZWGJP = (scan.gain.unflatten(1, (blocks, width)) * to_end_RZWH[..., None]).unflatten(3, (groups, -1))
    b_RZWGN = scan.b.unflatten(1, (blocks, width))
    gained_RZHPN = torch.einsum("rzwgjp,rzwgn->rzgjpn", gain_RZWGJP, b_RZWGN).flatten(2, 3)
    ends = []
    for block in range(blocks):
        end = width * (block + 1)
        ssm_RHPN = torch.addcmul(gained_RZHPN[:, block], ssm_RHPN, from_here_RZWH[:, block, 0, :, None, None])
        ends.append((scan.stream[:, end : end + window], ssm_RHPN))
    return ends


def _zero_states(config: ModelConfig, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    conv_RKC = torch.zeros(rows, config.conv_kernel, config.conv_channels, device=device)
    heads, width, state = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
    return conv_RKC, torch.zeros(rows, heads, width, state, device=device)


def _pad_rows(t: Tensor, rows: int) -> Tensor:
    missing = rows - t.shape[0]
    return F.pad(t, [0, 0] * (t.dim() - 1) + [0, missing]) if missing else t
