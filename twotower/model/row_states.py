"""What rows of an eager pass read and write of a cache: `LayerStates` of a pass that extends, and of one that reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.model.in_pages import InPages, Own, readable_in_place
from twotower.model.pages import WASTE_PAGE, ZERO_PAGE, pages_for
from twotower.model.rescan import KeptScan
from twotower.model.transfer import on_device

if TYPE_CHECKING:
    from twotower.model.cache import TowerCache


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
        self._table_RZ, self._reach = cache.page_table(slots, max(ends)), max(self.starts) + width
        waste = WASTE_PAGE * cache.page_tokens
        write_RL, seen_RL = [], []
        for slot, start, end in zip(slots, self.starts, ends, strict=True):
            padding = width - (end - start)
            write_RL.append(cache.flat_positions(slot, start, end) + [waste] * padding)
            seen_RL.append([*range(start, end), *[end - 1] * padding])
        self._write_M = on_device(write_RL, cache.device).flatten()
        self._last_RL = on_device(seen_RL, cache.device)
        # A short row far ahead of the others may have padding beyond the last page gathered.
        gathered = self._table_RZ.shape[1] * cache.page_tokens
        self.starts_R = self._last_RL[:, 0] if self._reach <= gathered else None

    @cached_property
    def mask_RLT(self) -> Tensor:
        keys_T = self.cache.positions(self._table_RZ.shape[1] * self.cache.page_tokens)
        return keys_T <= self._last_RL[..., None]

    def keys_values(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._written(layer, keys_RLSE, values_RLSE)
        return keys[self._table_RZ].flatten(1, 2), values[self._table_RZ].flatten(1, 2)

    def in_pages(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> InPages | None:
        if not readable_in_place(self.cache.page_tokens):
            return None
        return InPages(*self._written(layer, keys_RLSE, values_RLSE), *self._counted)

    def _written(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> tuple[Tensor, Tensor]:
        row = self.cache.attention_row(layer)
        keys, values = self.cache.keys[row], self.cache.values[row]
        keys.flatten(0, 1).index_copy_(0, self._write_M, keys_RLSE.flatten(0, 1))
        values.flatten(0, 1).index_copy_(0, self._write_M, values_RLSE.flatten(0, 1))
        return keys, values

    @cached_property
    def _counted(self) -> tuple[Tensor, Tensor]:
        """The table, wide enough for padding too, and how many keys the last position of each row sees."""
        table_RZ = at_least(self._table_RZ, pages_for(self._reach, self.cache.page_tokens))
        return table_RZ.int(), (self._last_RL[:, 0] + self._last_RL.shape[1]).int()


class ReadStates(_RowStates):
    """A denoiser pass: the mirror's keys and values, then the block's own; every block position sees them all."""

    updates = False

    def __init__(self, cache: TowerCache, slots: Sequence[int], lengths: Sequence[int], width: int) -> None:
        super().__init__(cache, slots, lengths, width)
        self._width, self._cached_RZ = width, cache.page_table(slots, max(self.starts))
        self._limits = on_device([self.starts, list(lengths)], cache.device)
        self.starts_R: Tensor | None = self._limits[0]

    @cached_property
    def mask_RLT(self) -> Tensor:
        starts_R1, lengths_R1 = self._limits[..., None]
        cached_RT = self.cache.positions(self._cached_RZ.shape[1] * self.cache.page_tokens) < starts_R1
        own_RT = self.cache.positions(self._width) < lengths_R1
        return torch.cat([cached_RT, own_RT], dim=1)[:, None].expand(-1, self._width, -1)

    def keys_values(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> tuple[Tensor, Tensor]:
        row, size = self.cache.attention_row(layer), self.cache.page_tokens
        keys, values = self.cache.keys[row], self.cache.values[row]
        table_RZ = self._table_RZ
        return gathered(keys, table_RZ, keys_RLSE, size), gathered(values, table_RZ, values_RLSE, size)

    def in_pages(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> InPages | None:
        if not readable_in_place(self.cache.page_tokens):
            return None
        row, (table_RZ, starts_R, lengths_R) = self.cache.attention_row(layer), self._counted
        own = Own(keys_RLSE, values_RLSE, lengths_R)
        return InPages(self.cache.keys[row], self.cache.values[row], table_RZ, starts_R, own)

    @cached_property
    def _table_RZ(self) -> Tensor:
        return with_own_pages(self._cached_RZ, self._width, self.cache.page_tokens)

    @cached_property
    def _counted(self) -> tuple[Tensor, Tensor, Tensor]:
        starts_R, lengths_R = self._limits.int()
        return at_least(self._cached_RZ, 1).int(), starts_R, lengths_R


def at_least(table_RZ: Tensor, pages: int) -> Tensor:
    """A page table of so many columns or more: of zero pages, where nothing is seen."""
    return F.pad(table_RZ, (0, max(0, pages - table_RZ.shape[1])), value=ZERO_PAGE)


def with_own_pages(table_RZ: Tensor, width: int, page_tokens: int) -> Tensor:
    """A page table with room for a block's own positions behind the cached ones: zero pages, which `gathered` fills."""
    return F.pad(table_RZ, (0, pages_for(width, page_tokens)), value=ZERO_PAGE)


def gathered(pages_ZKSE: Tensor, table_RZ: Tensor, own_RLSE: Tensor, page_tokens: int) -> Tensor:
    """All that each row's pages hold, then the block's own [R,T,S,E]: a new tensor, copied once. The table is one
    `with_own_pages`. `page_tokens` is K, as a number that a recorded program need not ask for."""
    length = own_RLSE.shape[1]
    whole_RTSE = pages_ZKSE[table_RZ].flatten(1, 2)
    cached = whole_RTSE.shape[1] - pages_for(length, page_tokens) * page_tokens
    whole_RTSE[:, cached : cached + length] = own_RLSE
    return whole_RTSE[:, : cached + length]
