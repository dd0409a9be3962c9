"""flash-attn and torch's varlen attention as their documentation has them (flash-attn 2.6 to 2.8, torch 2.12), slowly.

What ours never passes they do not take. Nor do they insist on 16 bits, so that towers can be compared in fp32.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor

from twotower.model.attention import attend
from twotower.model.kernels import choose, install
from twotower.model.kernels.flash_attention import ByNumber, attention, flash_attn, varlen_attn
from twotower.model.tower import ContextTower, DenoiserTower

AnyTower = TypeVar("AnyTower", ContextTower, DenoiserTower)
Load = Callable[[str], ModuleType]
ADAPTERS: dict[str, Callable[[Load], ByNumber]] = {
    "flash_attn": lambda load: flash_attn(load("flash_attn")),
    "torch varlen_attn": lambda load: varlen_attn(load("torch.nn.attention.varlen")),
}


class FlashStandIns:
    """Counts its calls. Methods beginning with an underscore are what a wrong kernel gets wrong."""

    def __init__(self) -> None:
        self.calls = 0

    def load(self, name: str) -> ModuleType:
        functions = {"flash_attn": self.flash_attn_with_kvcache, "torch.nn.attention.varlen": self.varlen_attn}
        if name not in functions:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return SimpleNamespace(**{functions[name].__name__: functions[name]})  # type: ignore[return-value]

    def flash_attn_with_kvcache(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, causal: bool = False
    ) -> Tensor:
        rows, room = k_cache.shape[:2]
        assert cache_seqlens.shape == (rows,)
        assert cache_seqlens.dtype is torch.int32
        assert cache_seqlens.is_contiguous()
        assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
        at_L, keys_T = (torch.arange(count, device=q.device) for count in (q.shape[1], room))
        seen_RLT = self._seen(at_L[None, :, None], keys_T, q.shape[1], cache_seqlens[:, None, None], causal)
        return self._weighed(q, k_cache, v_cache, seen_RLT.expand(rows, len(at_L), room))

    def varlen_attn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: Tensor,
    ) -> Tensor:
        assert cu_seq_q.dtype == cu_seq_k.dtype == seqused_k.dtype == torch.int32
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert window_size in ((-1, -1), (-1, 0))
        (row_q, at_q), (row_k, at_k) = (_unpacked(cu, len(t)) for cu, t in ((cu_seq_q, query), (cu_seq_k, key)))
        lengths_q = cu_seq_q.diff()[row_q, None]
        seen = self._seen(at_q[:, None], at_k, lengths_q, seqused_k[row_q, None], window_size == (-1, 0))
        return self._weighed(query[None], key[None], value[None], (seen & (row_q[:, None] == row_k))[None])[0]

    def _seen(self, at_q: Tensor, at_k: Tensor, num_q: Tensor | int, used_k: Tensor, causal: bool) -> Tensor:
        """Which keys a query sees. Causal is aligned to the bottom right."""
        return (at_k < used_k) & ((at_k <= at_q + used_k - num_q) if causal else True)

    def _grouped(self, part_RTSE: Tensor, heads: int) -> Tensor:
        return part_RTSE.unsqueeze(3).expand(-1, -1, -1, heads // part_RTSE.shape[2], -1).flatten(2, 3)

    def _weighed(self, q: Tensor, k: Tensor, v: Tensor, seen_RLT: Tensor) -> Tensor:
        """A query that sees nothing comes out as zero."""
        self.calls += 1
        k, v = (self._grouped(part, q.shape[2]) for part in (k, v))
        scores_RHLT = torch.einsum("rlhe,rthe->rhlt", q.float(), k.float()) * q.shape[-1] ** -0.5
        weights_RHLT = scores_RHLT.masked_fill(~seen_RLT[:, None], -torch.inf).softmax(-1).nan_to_num(0)
        return torch.einsum("rhlt,rthe->rlhe", weights_RHLT, v.float()).to(q.dtype)


def through(kernel: ByNumber, tower: AnyTower) -> AnyTower:
    """The same tower with its attention through the kernel."""
    ours = type(tower)(tower.config).to(tower.device, tower.dtype).requires_grad_(False).eval()
    ours.load_state_dict(tower.state_dict())
    install(ours, replace(choose(tower.config, tower.device, tower.dtype, "torch"), attend=attention(kernel, attend)))
    return ours


def _unpacked(offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of every packed position, its row and its place there."""
    packed = torch.arange(total, device=offsets.device)
    row = torch.searchsorted(offsets, packed, right=True) - 1
    return row, packed - offsets[row]
