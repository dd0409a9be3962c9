"""`LayerStates` of a recorded or captured pass: all it knows are numbers on the device, the host computes nothing."""

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from twotower.model.in_pages import InPages, Own, readable_in_place
from twotower.model.pages import WASTE_PAGE
from twotower.model.rescan import Keeps
from twotower.model.row_states import gathered, with_own_pages


class CacheMemory(Protocol):
    """What a pass reads and writes of a `TowerCache`."""

    conv: Tensor
    ssm: Tensor
    keys: Tensor
    values: Tensor
    page_tokens: int

    def mamba_row(self, layer: int) -> int: ...

    def attention_row(self, layer: int) -> int: ...


class FixedStates:
    """LayerStates whose every number is computed on the device from `slots`, `starts`, `lengths` and page tables.

    The tables of a pass that `updates` are wide enough for `width` positions behind each row's start.
    """

    def __init__(
        self, cache: CacheMemory, given_RX: Tensor, width: int, updates: bool, kept: Keeps | None = None
    ) -> None:
        slots_R1, starts_R1, lengths_R1, table_RZ = given_RX.split([1, 1, 1, given_RX.shape[1] - 3], dim=1)
        self.updates, self.kept, self._cache, self._table_RZ = updates, kept, cache, table_RZ
        self._slots_R, self.lengths_R = slots_R1[:, 0], lengths_R1[:, 0]
        self.starts_R: Tensor | None = starts_R1[:, 0]
        self._starts_R1, self._lengths_R1 = starts_R1, lengths_R1
        self._new_L = torch.arange(width, device=given_RX.device)
        if updates:
            real_RL = self._new_L < lengths_R1
            self._write_M = _places(table_RZ, starts_R1 + self._new_L, real_RL, cache.page_tokens).flatten()

    @cached_property
    def mask_RLT(self) -> Tensor:
        keys_T = torch.arange(self._table_RZ.shape[1] * self._cache.page_tokens, device=self._table_RZ.device)
        if self.updates:
            last_RL = self._starts_R1 + torch.minimum(self._new_L, self._lengths_R1 - 1)
            mask_RLT: Tensor = keys_T <= last_RL[..., None]
            return mask_RLT
        seen_RT = torch.cat([keys_T < self._starts_R1, self._new_L < self._lengths_R1], dim=1)
        return seen_RT[:, None].expand(-1, len(self._new_L), -1)

    def mamba(self, layer: int) -> tuple[Tensor, Tensor]:
        row = self._cache.mamba_row(layer)
        return (
            self._cache.conv[row].index_select(0, self._slots_R),
            self._cache.ssm[row].index_select(0, self._slots_R),
        )

    def put_mamba(self, layer: int, conv_RKC: Tensor, ssm_RHPN: Tensor) -> None:
        row = self._cache.mamba_row(layer)
        self._cache.conv[row].index_copy_(0, self._slots_R, conv_RKC)
        self._cache.ssm[row].index_copy_(0, self._slots_R, ssm_RHPN)

    def keys_values(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._of_layer(layer, keys_RLSE, values_RLSE)
        if self.updates:
            return keys[self._table_RZ].flatten(1, 2), values[self._table_RZ].flatten(1, 2)
        table_RZ, size = self._gathered_RZ, self._cache.page_tokens
        return gathered(keys, table_RZ, keys_RLSE, size), gathered(values, table_RZ, values_RLSE, size)

    def in_pages(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> InPages | None:
        if not readable_in_place(self._cache.page_tokens):
            return None
        table_RZ, ends_R, lengths_R = self._counted
        own = None if self.updates else Own(keys_RLSE, values_RLSE, lengths_R)
        return InPages(*self._of_layer(layer, keys_RLSE, values_RLSE), table_RZ, ends_R, own)

    def _of_layer(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's pages, with the new keys and values where the pass extends."""
        row = self._cache.attention_row(layer)
        keys, values = self._cache.keys[row], self._cache.values[row]
        if self.updates:
            keys.flatten(0, 1).index_copy_(0, self._write_M, keys_RLSE.flatten(0, 1))
            values.flatten(0, 1).index_copy_(0, self._write_M, values_RLSE.flatten(0, 1))
        return keys, values

    @cached_property
    def _gathered_RZ(self) -> Tensor:
        return with_own_pages(self._table_RZ, len(self._new_L), self._cache.page_tokens)

    @cached_property
    def _counted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Table, seen positions of each row, and real new ones, as a kernel of paged memory takes them."""
        ends_R = self._starts_R1[:, 0] + (len(self._new_L) if self.updates else 0)
        return self._table_RZ.int(), ends_R.int(), self._lengths_R1[:, 0].int()


def _places(table_RZ: Tensor, positions_RL: Tensor, real_RL: Tensor, page_tokens: int) -> Tensor:
    """Where positions lie in the flattened page memory [R,L]; padding goes to the waste page."""
    pages_RL = table_RZ.gather(1, (positions_RL // page_tokens).clamp(max=table_RZ.shape[1] - 1))
    return torch.where(real_RL, pages_RL * page_tokens + positions_RL % page_tokens, WASTE_PAGE * page_tokens)
