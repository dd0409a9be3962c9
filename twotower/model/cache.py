"""The state of many sequences, preallocated: a slot each for the Mamba layers, pages of tokens for attention.

The context tower extends it; the denoiser's mirror is the same thing, written by cache deltas only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.config import ModelConfig
from twotower.model.memory import untouched_zeros
from twotower.model.pages import RESERVED_PAGES, ZERO_PAGE, page_tokens_on
from twotower.model.rescan import KeptScans, settle
from twotower.model.room import Held, Room
from twotower.model.row_states import ExtendStates, ReadStates
from twotower.model.scaled import Scaled
from twotower.model.snapshots import Snapshots
from twotower.model.transfer import on_device


class Span(NamedTuple):
    """Positions [start, end) of the sequence at `slot`; `with_states`: also its Mamba states, those after `end`."""

    slot: int
    start: int
    end: int
    with_states: bool = True


@dataclass(slots=True)
class _Sequence:
    held: Held
    length: int = 0


class TowerCache:
    """Conv windows, SSM states (fp32) and key/value pages of up to `slots` sequences with `pages` pages together.

    `room` says which of them are free. `snapshots`: how many copies of a sequence's Mamba states can be kept besides,
    `snapshots_on_host` in the host's memory.
    `page_tokens`: positions that a page holds; None: what is usual on the device (`twotower.model.pages`).
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        pages: int,
        device: torch.device,
        dtype: torch.dtype,
        snapshots: int = 0,
        page_tokens: int | None = None,
        snapshots_on_host: bool = False,
    ) -> None:
        self.config = config
        self.page_tokens = page_tokens or page_tokens_on(device.type)
        mamba, attention = config.layers_of("M"), config.layers_of("*")
        self._mamba_row = {layer: i for i, layer in enumerate(mamba)}
        self._attention_row = {layer: i for i, layer in enumerate(attention)}
        window, channels = config.conv_kernel, config.conv_channels
        state = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        page = (self.page_tokens, config.num_key_value_heads, config.head_dim)
        all_pages = RESERVED_PAGES + pages
        # One slot more than sequences can take, for rows of a pass that nobody asked for.
        self.scratch_slot = slots
        self.conv = torch.zeros(len(mamba), slots + 1, window, channels, device=device, dtype=dtype)
        self.ssm = torch.zeros(len(mamba), slots + 1, *state, device=device)
        self.device = self.ssm.device  # with its index, whatever it was called
        self.snapshots = Snapshots(snapshots, self.conv, self.ssm, snapshots_on_host)
        self.keys = untouched_zeros((len(attention), all_pages, *page), device, dtype)
        self.values = untouched_zeros(self.keys.shape, device, dtype)
        self.room = Room(slots, pages, RESERVED_PAGES, self.page_tokens)
        self._sequences: dict[int, _Sequence] = {}
        self._counting = on_device(range(1024), device)  # on meta, `arange` would make torch import sympy

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.conv, self.ssm, self.keys, self.values))

    def length(self, slot: int) -> int:
        """Tokens this sequence's state has read."""
        return self._sequences[slot].length

    def allocate(self, tokens: int, prefix: Sequence[int] = (), snapshot: int | None = None) -> int:
        """A slot with room for `tokens` positions. Raises Overloaded where there is none.

        Without `prefix` and `snapshot` its state is zero. Otherwise it has read the positions on the whole pages of
        `prefix`, which may be shared, and its Mamba states are those of `snapshot`.
        """
        held = self.room.take(tokens, prefix)
        self._sequences[held.slot] = _Sequence(held, len(prefix) * self.page_tokens)
        if snapshot is None:
            self.conv[:, held.slot] = 0
            self.ssm[:, held.slot] = 0
        else:
            self.snapshots.load(snapshot, held.slot)
        pages_Z = on_device(held.pages[len(prefix) :], self.device, torch.long)
        self.keys.index_fill_(1, pages_Z, 0)
        self.values.index_fill_(1, pages_Z, 0)
        return held.slot

    def free(self, slot: int) -> None:
        self.room.give(self._sequences.pop(slot).held)

    def advance(self, slot: int, tokens: int) -> None:
        """Count `tokens` positions as read. Room for them was reserved by `allocate`."""
        sequence = self._sequences[slot]
        sequence.length += tokens
        assert sequence.length <= len(sequence.held.pages) * self.page_tokens, "a sequence outgrew its reservation"

    def extending(
        self, slots: Sequence[int], lengths: Sequence[int], width: int, keeps_scans: bool = False
    ) -> ExtendStates:
        """States for a causal pass that appends `lengths[r]` of `width` positions to each row.

        The caller advances the slots after the pass; or, where it `keeps_scans`, settles them.
        """
        return ExtendStates(self, slots, lengths, width, keeps_scans)

    def settle(self, slots: Sequence[int], scans: KeptScans | None, cuts: Sequence[int]) -> None:
        """After a pass that kept its `scans`: the first `cuts[r]` positions of each row are read, the others never
        were. Their keys and values lie beyond the sequence's end, where nothing looks before they are overwritten."""
        if scans is not None:
            settle(self.conv, self.ssm, slots, scans, cuts)
        for slot, cut in zip(slots, cuts, strict=True):
            self.advance(slot, cut)

    def reading(self, slots: Sequence[int], lengths: Sequence[int], width: int) -> ReadStates:
        """States for a denoiser pass over blocks of `lengths[r]` of `width` positions; nothing is written."""
        return ReadStates(self, slots, lengths, width)

    def delta(self, spans: Sequence[Span]) -> list[Tensor]:
        """Copies that carry the spans to a mirror, side by side in their order.

        Keys and values are [layers, tokens, S, E]. For the n spans that bring states, conv windows are
        [layers, n, K, C] and SSM states [layers, n, H, P, N].
        """
        tokens, states = sum(span.end - span.start for span in spans), sum(span.with_states for span in spans)
        shapes = self.delta_shapes(tokens, states)
        out = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in shapes]
        self.copy_delta(spans, out)
        return out

    def copy_delta(self, spans: Sequence[Span], out: Sequence[Tensor | Scaled]) -> None:
        """`delta` into tensors of its shapes, each in a dtype of its own."""
        for (source, where), target in zip(self._indexed(spans), out, strict=True):
            if isinstance(target, Scaled):
                target.hold(source.index_select(1, where))
            elif source.dtype is target.dtype:
                torch.index_select(source, 1, where, out=target)
            else:
                target.copy_(source.index_select(1, where))

    def apply(self, spans: Sequence[Span], tensors: Sequence[Tensor | Scaled]) -> None:
        """Write what `delta` of another cache of the same shape made of spans alike, and count them as read.

        Each span starts where its sequence ends.
        """
        self.write(spans, tensors)
        for span in spans:
            self.advance(span.slot, span.end - span.start)

    def write(self, spans: Sequence[Span], tensors: Sequence[Tensor | Scaled]) -> None:
        """`apply` without counting. From any thread, as long as nobody reads or frees these sequences meanwhile."""
        for (target, where), tensor in zip(self._indexed(spans), tensors, strict=True):
            target.index_copy_(1, where, tensor.to(target.dtype))

    def delta_shapes(self, tokens: int, states: int) -> list[tuple[torch.Size, torch.dtype]]:
        """Shapes and dtypes of the tensors of a delta that brings so many positions and Mamba states."""
        page = torch.Size((self.keys.shape[0], tokens, *self.keys.shape[3:]))
        both = [(torch.Size((t.shape[0], states, *t.shape[2:])), t.dtype) for t in (self.conv, self.ssm)]
        return [(page, self.keys.dtype), (page, self.values.dtype), *both]

    def _indexed(self, spans: Sequence[Span]) -> list[tuple[Tensor, Tensor]]:
        """The four memories, each with the places along its dimension 1 that the spans cover."""
        positions = [p for span in spans for p in self.flat_positions(span.slot, span.start, span.end)]
        slots = [span.slot for span in spans if span.with_states]
        # As one transfer.
        positions_S, slots_N = on_device(positions + slots, self.device, torch.long).split([len(positions), len(slots)])
        keys, values = self.keys.flatten(1, 2), self.values.flatten(1, 2)
        return [(keys, positions_S), (values, positions_S), (self.conv, slots_N), (self.ssm, slots_N)]

    def pages_of(self, slot: int) -> Sequence[int]:
        """The pages of a sequence, in the order of its positions."""
        return self._sequences[slot].held.pages

    def flat_positions(self, slot: int, start: int, end: int) -> list[int]:
        """Indices of positions [start, end) of a sequence in the flattened page memory."""
        pages, size = self.pages_of(slot), self.page_tokens
        return [pages[p // size] * size + p % size for p in range(start, end)]

    def positions(self, count: int) -> Tensor:
        """0, 1, … count-1 on the cache's device, not to be written to."""
        if count > self._counting.shape[0]:
            self._counting = torch.arange(2 * count, device=self.device)
        return self._counting[:count]

    def page_table(self, slots: Sequence[int], tokens: int) -> Tensor:
        """Pages [R, pages] of each row's first `tokens` positions; the zero page where a row has fewer."""
        wide = self.room.pages_for(tokens)
        rows = [list(self.pages_of(slot)[:wide]) for slot in slots]
        rows = [pages + [ZERO_PAGE] * (wide - len(pages)) for pages in rows]
        return on_device(rows, self.device, torch.long).view(len(slots), wide)

    def mamba_row(self, layer: int) -> int:
        return self._mamba_row[layer]

    def attention_row(self, layer: int) -> int:
        return self._attention_row[layer]


def state_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one sequence's Mamba states, and so of one snapshot."""
    ssm = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * torch.float32.itemsize
    return len(config.layers_of("M")) * (ssm + config.conv_kernel * config.conv_channels * dtype.itemsize)
