"""The state of many sequences, preallocated: a slot each for the Mamba layers, pages of 16 tokens for attention.

The context tower extends it; the denoiser's mirror is the same thing, written by cache deltas only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.config import ModelConfig
from twotower.model.pages import PAGE_TOKENS, pages_for
from twotower.model.rescan import KeptScan, KeptScans, settle
from twotower.model.room import Held, Room
from twotower.model.scaled import Scaled
from twotower.model.transfer import on_device

ZERO_PAGE = 0  # read where a row has no page. Always zero: a masked weight of 0 must never meet a NaN.
WASTE_PAGE = 1  # written where a row has padding, never read
_RESERVED_PAGES = 2


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

    `room` says which of them are free. `snapshots`: how many copies of a sequence's Mamba states can be kept besides.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        pages: int,
        device: torch.device,
        dtype: torch.dtype,
        snapshots: int = 0,
    ) -> None:
        self.config = config
        mamba, attention = config.layers_of("M"), config.layers_of("*")
        self._mamba_row = {layer: i for i, layer in enumerate(mamba)}
        self._attention_row = {layer: i for i, layer in enumerate(attention)}
        window, channels = config.conv_kernel, config.conv_channels
        state = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        page = (PAGE_TOKENS, config.num_key_value_heads, config.head_dim)
        all_pages = _RESERVED_PAGES + pages
        # One slot more than sequences can take, for rows of a pass that nobody asked for.
        self.scratch_slot = slots
        self.conv = torch.zeros(len(mamba), slots + 1, window, channels, device=device, dtype=dtype)
        self.ssm = torch.zeros(len(mamba), slots + 1, *state, device=device)
        self.device = self.ssm.device  # with its index, whatever it was called
        self.kept_conv = _untouched_zeros((len(mamba), snapshots, window, channels), device, dtype)
        self.kept_ssm = _untouched_zeros((len(mamba), snapshots, *state), device, torch.float32)
        self.keys = _untouched_zeros((len(attention), all_pages, *page), device, dtype)
        self.values = _untouched_zeros(self.keys.shape, device, dtype)
        self.room = Room(slots, pages, first_page=_RESERVED_PAGES)
        self._sequences: dict[int, _Sequence] = {}
        self._counting = on_device(range(1024), device)  # on meta, `arange` would make torch import sympy

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.conv, self.ssm, self.keys, self.values))

    def length(self, slot: int) -> int:
        """Tokens this sequence's state has read."""
        return self._sequences[slot].length

    @property
    def snapshots(self) -> int:
        return self.kept_ssm.shape[1]

    def allocate(self, tokens: int, prefix: Sequence[int] = (), snapshot: int | None = None) -> int:
        """A slot with room for `tokens` positions. Raises Overloaded where there is none.

        Its state is zero; or it has read the positions on the whole pages of `prefix`, which others may hold, too, and
        its Mamba states are those of `snapshot`.
        """
        held = self.room.take(tokens, prefix)
        self._sequences[held.slot] = _Sequence(held, len(prefix) * PAGE_TOKENS)
        if snapshot is None:
            self.conv[:, held.slot] = 0
            self.ssm[:, held.slot] = 0
        else:
            self.conv[:, held.slot] = self.kept_conv[:, snapshot]
            self.ssm[:, held.slot] = self.kept_ssm[:, snapshot]
        pages_Z = on_device(held.pages[len(prefix) :], self.device, torch.long)
        self.keys.index_fill_(1, pages_Z, 0)
        self.values.index_fill_(1, pages_Z, 0)
        return held.slot

    def snap(self, slot: int, snapshot: int) -> None:
        """Keep a copy of this sequence's Mamba states."""
        self.kept_conv[:, snapshot] = self.conv[:, slot]
        self.kept_ssm[:, snapshot] = self.ssm[:, slot]

    def free(self, slot: int) -> None:
        self.room.give(self._sequences.pop(slot).held)

    def advance(self, slot: int, tokens: int) -> None:
        """Count `tokens` positions as read. Room for them was reserved by `allocate`."""
        sequence = self._sequences[slot]
        sequence.length += tokens
        assert sequence.length <= len(sequence.held.pages) * PAGE_TOKENS, "a sequence outgrew its reservation"

    def extending(
        self, slots: Sequence[int], lengths: Sequence[int], width: int, keeps_scans: bool = False
    ) -> "ExtendStates":
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

    def reading(self, slots: Sequence[int], lengths: Sequence[int], width: int) -> "ReadStates":
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
        pages = self.pages_of(slot)
        return [pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in range(start, end)]

    def positions(self, count: int) -> Tensor:
        """0, 1, … count-1 on the cache's device, not to be written to."""
        if count > self._counting.shape[0]:
            self._counting = torch.arange(2 * count, device=self.device)
        return self._counting[:count]

    def page_table(self, slots: Sequence[int], tokens: int) -> Tensor:
        """Pages [R, pages] of each row's first `tokens` positions; the zero page where a row has fewer."""
        wide = pages_for(tokens)
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


def _untouched_zeros(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros. On a CPU a part of them takes memory only once it is written: `torch.zeros` writes them all."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, device=device, dtype=dtype)
    memory = numpy.zeros(math.prod(shape) * dtype.itemsize, numpy.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)


class _RowStates:
    """What both kinds of pass share: the rows' slots and their Mamba seeds. Its children are LayerStates."""

    updates: bool

    def __init__(self, cache: TowerCache, slots: Sequence[int], lengths: Sequence[int], width: int) -> None:
        self.cache = cache
        self.kept: list[KeptScan] | None = None
        self.starts = [cache.length(slot) for slot in slots]
        self.lengths_R: Tensor | None = None
        if any(length != width for length in lengths):
            self.lengths_R = on_device(list(lengths), cache.device)
        # One row is a view of the cache, several are gathered.
        self._only = slots[0] if len(slots) == 1 else None
        self._slots_R = on_device(list(slots), cache.device, torch.long)

    def mamba(self, layer: int) -> tuple[Tensor, Tensor]:
        row = self.cache.mamba_row(layer)
        conv, ssm = self.cache.conv[row], self.cache.ssm[row]
        if self._only is not None:
            return conv[self._only, None], ssm[self._only, None]
        return conv.index_select(0, self._slots_R), ssm.index_select(0, self._slots_R)

    def put_mamba(self, layer: int, conv_RKC: Tensor, ssm_RHPN: Tensor) -> None:
        row = self.cache.mamba_row(layer)
        conv, ssm = self.cache.conv[row], self.cache.ssm[row]
        if self._only is not None:
            conv[self._only, None].copy_(conv_RKC)
            ssm[self._only, None].copy_(ssm_RHPN)
        else:
            conv.index_copy_(0, self._slots_R, conv_RKC)
            ssm.index_copy_(0, self._slots_R, ssm_RHPN)


class ExtendStates(_RowStates):
    """A causal pass of the context tower: new keys and values go into the pages, then all are read from there."""

    updates = True

    def __init__(
        self, cache: TowerCache, slots: Sequence[int], lengths: Sequence[int], width: int, keeps_scans: bool = False
    ) -> None:
        super().__init__(cache, slots, lengths, width)
        self.kept = [] if keeps_scans else None
        ends = [start + length for start, length in zip(self.starts, lengths, strict=True)]
        self._table_RZ = cache.page_table(slots, max(ends))
        write_RL, seen_RL = [], []
        for slot, start, end in zip(slots, self.starts, ends, strict=True):
            padding = width - (end - start)
            write_RL.append(cache.flat_positions(slot, start, end) + [WASTE_PAGE * PAGE_TOKENS] * padding)
            seen_RL.append([*range(start, end), *[end - 1] * padding])
        self._write_M = on_device(write_RL, cache.device).flatten()
        keys_T = cache.positions(self._table_RZ.shape[1] * PAGE_TOKENS)
        last_RL = on_device(seen_RL, cache.device)
        self.mask_RLT = keys_T <= last_RL[..., None]
        # A short row far ahead of the others may have padding beyond the last page gathered.
        self.starts_R = last_RL[:, 0] if max(self.starts) + width <= len(keys_T) else None

    def keys_values(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> tuple[Tensor, Tensor]:
        row = self.cache.attention_row(layer)
        keys, values = self.cache.keys[row], self.cache.values[row]
        keys.flatten(0, 1).index_copy_(0, self._write_M, keys_RLSE.flatten(0, 1))
        values.flatten(0, 1).index_copy_(0, self._write_M, values_RLSE.flatten(0, 1))
        return keys[self._table_RZ].flatten(1, 2), values[self._table_RZ].flatten(1, 2)


class ReadStates(_RowStates):
    """A denoiser pass: the mirror's keys and values, then the block's own; every block position sees them all."""

    updates = False

    def __init__(self, cache: TowerCache, slots: Sequence[int], lengths: Sequence[int], width: int) -> None:
        super().__init__(cache, slots, lengths, width)
        cached = cache.page_table(slots, max(self.starts))
        self._table_RZ = with_own_pages(cached, width)
        limits = on_device([self.starts, list(lengths)], cache.device)[..., None]
        self.starts_R: Tensor | None = limits[0, :, 0]
        cached_RT = cache.positions(cached.shape[1] * PAGE_TOKENS) < limits[0]
        own_RT = cache.positions(width) < limits[1]
        self.mask_RLT = torch.cat([cached_RT, own_RT], dim=1)[:, None].expand(-1, width, -1)

    def keys_values(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> tuple[Tensor, Tensor]:
        row = self.cache.attention_row(layer)
        keys, values = self.cache.keys[row], self.cache.values[row]
        return gathered(keys, self._table_RZ, keys_RLSE), gathered(values, self._table_RZ, values_RLSE)


def with_own_pages(table_RZ: Tensor, width: int) -> Tensor:
    """A page table with room for a block's own positions behind the cached ones: zero pages, which `gathered` fills."""
    return F.pad(table_RZ, (0, pages_for(width)), value=ZERO_PAGE)


def gathered(pages_ZKSE: Tensor, table_RZ: Tensor, own_RLSE: Tensor) -> Tensor:
    """All that each row's pages hold, then the block's own [R,T,S,E]: a new tensor, copied once. The table is one
    `with_own_pages`."""
    length = own_RLSE.shape[1]
    whole_RTSE = pages_ZKSE[table_RZ].flatten(1, 2)
    cached = whole_RTSE.shape[1] - pages_for(length) * PAGE_TOKENS
    whole_RTSE[:, cached : cached + length] = own_RLSE
    return whole_RTSE[:, : cached + length]
