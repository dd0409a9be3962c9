"""flash-attn and torch's varlen attention as their sources have them (2.8.3 and 2.13), slowly, in our own words.

What ours never passes they do not take; what the real ones refuse they refuse, but for values, which the host cannot
see. `fwd_kvcache` and `flash_attention_forward` stand for the compiled parts, and the real Python runs over them:
flash-attn's in `tests/kernels`, torch's in `tests/model/test_flash_attention.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tests.mamba_stand_ins import aligned, refuse_unless
from twotower.model.attention import attend
from twotower.model.kernels import choose, install, paged_attention
from twotower.model.kernels.flash_attention import ByNumber, attention, flash_attn, varlen_attn
from twotower.model.kernels.paged_attention import ByTable
from twotower.model.tower import ContextTower, DenoiserTower

AnyTower = TypeVar("AnyTower", ContextTower, DenoiserTower)
Load = Callable[[str], ModuleType]
ADAPTERS: dict[str, Callable[[Load], ByNumber]] = {
    "flash_attn": lambda load: flash_attn(load("flash_attn")),
    "torch varlen_attn": lambda load: varlen_attn(load("torch.nn.attention.varlen")),
}


PAGED: dict[str, Callable[[Load], ByTable]] = {
    "flash_attn": lambda load: paged_attention.flash_attn(load("flash_attn")),
    "torch varlen_attn": lambda load: paged_attention.varlen_attn(load("torch.nn.attention.varlen")),
}


class _AuxRequest(NamedTuple):
    lse: bool = False


class FlashStandIns:
    """Counts its calls. Methods beginning with an underscore are what a wrong kernel gets wrong.

    The real ones compute in 16 bits only; towers are compared in fp32 where `any_dtype`.
    """

    def __init__(self, any_dtype: bool = False) -> None:
        self.calls, self.any_dtype = 0, any_dtype

    def load(self, name: str) -> ModuleType:
        functions = {"flash_attn": self.flash_attn_with_kvcache, "torch.nn.attention.varlen": self.varlen_attn}
        if name not in functions:
            raise ModuleNotFoundError(f"No module named {name!r}")
        module = SimpleNamespace(**{functions[name].__name__: functions[name]}, AuxRequest=_AuxRequest)
        return module  # type: ignore[return-value]

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        block_table: Tensor | None = None,
        causal: bool = False,
        return_softmax_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert k_cache.stride(-1) == 1, "k_cache must have contiguous last dimension"
        assert v_cache.stride(-1) == 1, "v_cache must have contiguous last dimension"
        if block_table is not None and block_table.stride(-1) != 1:
            block_table = block_table.contiguous()
        unused, scale = (None,) * 4, q.shape[-1] ** -0.5
        filled = (None, None, cache_seqlens, *unused, block_table, None, None, scale, causal, -1, -1, 0.0, True, 0)
        out, sums = self.fwd_kvcache(q.contiguous() if q.stride(-1) != 1 else q, k_cache, v_cache, *filled)
        return (out, sums) if return_softmax_lse else out

    def fwd_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: None,
        v: None,
        seqlens_k: Tensor,
        rotary_cos: None,
        rotary_sin: None,
        cache_batch_idx: None,
        leftpad_k: None,
        block_table: Tensor | None,
        alibi_slopes: None,
        out: None,
        softmax_scale: float,
        causal: bool,
        window_left: int,
        window_right: int,
        softcap: float,
        rotary_interleaved: bool,
        num_splits: int,
    ) -> tuple[Tensor, Tensor]:
        never = (k, v, rotary_cos, rotary_sin, cache_batch_idx, leftpad_k, alibi_slopes, out)
        assert never == (None,) * len(never), "what ours never passes"
        assert (window_left, window_right, softcap, num_splits) == (-1, -1, 0.0, 0), "what ours never passes"
        rows, length, _, width = q.shape
        size, kv_heads = k_cache.shape[1:3]
        self._refuse_misfits(q, k_cache, v_cache)
        refuse_unless(rows > 0, "batch size must be positive")
        holders = rows if block_table is None else k_cache.shape[0]
        for part in (k_cache, v_cache):
            refuse_unless(part.shape == (holders, size, kv_heads, width), "the caches must have shape")
        _refuse_numbers(seqlens_k, rows)
        if block_table is not None:
            _refuse_tables(block_table, rows, size)
            if type(seqlens_k) is Tensor:  # on a stand-in GPU the host would wait for the number
                assert int(seqlens_k.max()) <= block_table.shape[1] * size, "keys beyond the table: any memory is read"
            k_cache, v_cache = (self._paged(part, block_table) for part in (k_cache, v_cache))
        room = k_cache.shape[1]
        at_L, keys_T = (torch.arange(count, device=q.device) for count in (length, room))
        seen_RLT = self._seen(at_L[None, :, None], keys_T, length, seqlens_k[:, None, None], causal)
        return self._weighed(q, k_cache, v_cache, seen_RLT.expand(rows, length, room), softmax_scale)

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
        return_aux: "_AuxRequest | None" = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: Tensor | None = None,
        block_table: Tensor | None = None,
        num_splits: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not enable_gqa and query.shape[1] != key.shape[-2]:
            raise ValueError("Expect query and key/value to have the same number of heads")
        left, right = window_size
        lengths = (cu_seq_q, cu_seq_k, max_q, max_k)
        out, sums, *_ = self.flash_attention_forward(
            query,
            key,
            value,
            *lengths,
            0.0,
            window_size == (-1, 0),
            False,
            window_size_left=left,
            window_size_right=right,
            seqused_k=seqused_k,
            block_table=block_table,
            num_splits=num_splits,
        )
        return (out, sums) if return_aux is not None and return_aux.lse else out

    def flash_attention_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_seq_q: Tensor,
        cum_seq_k: Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        seqused_k: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        block_table: Tensor | None = None,
        num_splits: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        assert (scale, alibi_slopes) == (None,) * 2, "what ours never passes"
        assert seqused_k is not None, "what ours always passes"
        assert num_splits == 1 or block_table is None, "split keys of paged memory may come out as NaN"
        assert (window_size_left, window_size_right) == (-1, 0 if is_causal else -1)
        rows = cum_seq_q.shape[0] - 1
        self._refuse_misfits(query, key, value)
        refuse_unless(query.shape[-1] % 8 == 0, "head_size must be a multiple of 8, this is ensured by padding!")
        refuse_unless(key.shape == value.shape, "v must have shape (total_k, num_heads_k, head_size)")
        if block_table is not None:
            _refuse_tables(block_table, rows, key.shape[1])
            key, value = (self._paged(part, block_table).flatten(0, 1) for part in (key, value))
        refuse_unless(query.shape[0] == rows * max_q and key.shape[0] == rows * max_k, "rows as ours packs them")
        for offsets in (cum_seq_q, cum_seq_k):
            _refuse_numbers(offsets, rows + 1)
        _refuse_numbers(seqused_k, rows)
        (row_q, at_q), (row_k, at_k) = (_unpacked(cu, len(t)) for cu, t in ((cum_seq_q, query), (cum_seq_k, key)))
        lengths_q = cum_seq_q.diff()[row_q, None]
        seen = self._seen(at_q[:, None], at_k, lengths_q, seqused_k[row_q, None], is_causal)
        seen = seen & (row_q[:, None] == row_k)
        out, sums = self._weighed(query[None], key[None], value[None], seen[None], query.shape[-1] ** -0.5)
        unread = torch.empty(0, device=query.device)
        return out[0], sums[0], unread, unread, unread

    def _refuse_misfits(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """What both kernels refuse, where heads and their width come last."""
        heads, width = query.shape[-2:]
        dtypes = (torch.float16, torch.bfloat16)
        refuse_unless(self.any_dtype or query.dtype in dtypes, "FlashAttention only support fp16 and bf16 data type")
        refuse_unless(key.dtype is value.dtype is query.dtype, "query, key and value must have the same dtype")
        refuse_unless(width <= 256, "FlashAttention forward only supports head dimension at most 256")
        refuse_unless(heads % key.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")
        for part in (query, key, value):
            refuse_unless(part.stride(-1) == 1, "Input tensor must have contiguous last dimension")
            refuse_unless(aligned(part, *range(part.dim() - 1)), "misaligned address")

    def _seen(self, at_q: Tensor, at_k: Tensor, num_q: Tensor | int, used_k: Tensor, causal: bool) -> Tensor:
        """Which keys a query sees. Causal is aligned to the bottom right."""
        return (at_k < used_k) & ((at_k <= at_q + used_k - num_q) if causal else True)

    def _paged(self, part_ZKSE: Tensor, table_RZ: Tensor) -> Tensor:
        """Each row's pages, one behind the other [R,T,S,E]."""
        return part_ZKSE[table_RZ.long()].flatten(1, 2)

    def _grouped(self, part_RTSE: Tensor, heads: int) -> Tensor:
        return part_RTSE.unsqueeze(3).expand(-1, -1, -1, heads // part_RTSE.shape[2], -1).flatten(2, 3)

    def _weighed(self, q: Tensor, k: Tensor, v: Tensor, seen_RLT: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """With the logarithm of the weights' sum [R,H,L]. A query that sees nothing comes out as zero, and the sum as
        infinity."""
        self.calls += 1
        k, v = (self._grouped(part, q.shape[2]) for part in (k, v))
        scores_RHLT = torch.einsum("rlhe,rthe->rhlt", q.float(), k.float()) * scale
        scores_RHLT = scores_RHLT.masked_fill(~seen_RLT[:, None], -torch.inf)
        sums_RHL = scores_RHLT.logsumexp(-1)
        weights_RHLT, v = scores_RHLT.softmax(-1).nan_to_num(0), v.float().nan_to_num(0)
        out = torch.einsum("rhlt,rthe->rlhe", weights_RHLT, v).to(q.dtype)
        return out, sums_RHL.where(sums_RHL > -torch.inf, torch.inf)


def through(kernel: ByNumber, tower: AnyTower) -> AnyTower:
    """The same tower with its attention through the kernel."""
    return _with(tower, attend=attention(kernel, attend))


def in_pages(kernel: ByTable, tower: AnyTower) -> AnyTower:
    """The same tower with its attention through a kernel that reads pages in place, and through no other."""

    def unused(*_: object) -> Tensor:
        raise AssertionError("pages were gathered")

    return _with(tower, attend=unused, attend_in_pages=paged_attention.attention(kernel))


def _with(tower: AnyTower, **changed: Any) -> AnyTower:
    ours = type(tower)(tower.config).to(tower.device, tower.dtype).requires_grad_(False).eval()
    ours.load_state_dict(tower.state_dict())
    install(ours, replace(choose(tower.config, tower.device, tower.dtype, "torch"), **changed))
    return ours


def _refuse_tables(block_table: Tensor, rows: int, page_size: int) -> None:
    """What the kernel of paged memory refuses besides."""
    refuse_unless(block_table.dtype is torch.int32, "block_table must have dtype torch.int32")
    refuse_unless(block_table.stride(-1) == 1, "block_table must have contiguous last dimension")
    refuse_unless(page_size % 256 == 0, "Paged KV cache block size must be divisible by 256")
    refuse_unless(block_table.dim() == 2 and block_table.shape[0] == rows, "block_table must have shape")


def _refuse_numbers(numbers: Tensor, count: int) -> None:
    """Lengths or offsets as both kernels want them."""
    refuse_unless(numbers.dtype is torch.int32, "must have dtype int32")
    refuse_unless(numbers.is_contiguous() and numbers.shape == (count,), f"must be contiguous with shape ({count})")


def _unpacked(offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of every packed position, its row and its place there."""
    packed = torch.arange(total, device=offsets.device)
    row = torch.searchsorted(offsets, packed, right=True) - 1
    return row, packed - offsets[row]
