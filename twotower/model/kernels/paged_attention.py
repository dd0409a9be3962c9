"""Attention over pages where they lie, by flash-attn or by the function that torch brings: nothing is gathered, joined
or padded to the longest row.

A pass that extends has its new keys in the pages already: one call, causal. A denoiser's pass must leave the pages as
they are. They may be others' too: a prefix's, or a mirror's that a delta is just entering. So the cached keys and the
block's own are two calls. Each gives the logarithm of its weights' sum, and by those the results are mixed: softmax
over both together is exactly that mix.
Seen so far: the Python of both packages over a stand-in for what they compile, never on a GPU.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twotower.model.attention import AttendInPages
from twotower.model.in_pages import InPages

# Queries [R,L,H,E] read the first `ends_R` (int32) keys and values of each row. The flag says whether they do so
# causally: the last query sees all of these keys, each query before it one key fewer. Keys and values lie in pages
# [Z,K,S,E] with a table [R,Z] (int32), or without a table row by row [R,K,S,E]. Gives the result, zero for a row
# without keys, and the logarithm of the weights' sum [R,H,L] (fp32).
ByTable = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor]]


def attention(kernel: ByTable) -> AttendInPages:
    """What a layer attends to in pages, through the kernel."""

    def attend(queries_RLHE: Tensor, seen: InPages) -> Tensor:
        pages, own = (seen.keys, seen.values, seen.ends_R, seen.table_RZ), seen.own
        if own is None:
            # The only query of a pass sees all keys anyway; called causal, it would keep a kernel from folding heads.
            return kernel(queries_RLHE, *pages, queries_RLHE.shape[1] > 1)[0]
        queries_RQSE = _folded(queries_RLHE, seen.keys.shape[2])
        cached = kernel(queries_RQSE, *pages, False)
        looked = kernel(queries_RQSE, own.keys, own.values, own.lengths_R, None, False)
        return _unfolded(_mixed(seen.ends_R, cached, looked), queries_RLHE.shape[1])

    return attend


def _folded(queries_RLHE: Tensor, kv_heads: int) -> Tensor:
    """Query heads of one key/value head as more queries of it [R,Q,S,E]: where nothing is causal, they see the same.
    A kernel's tile holds 64 queries and reads the keys for itself; a block has 16."""
    return queries_RLHE.unflatten(2, (kv_heads, -1)).transpose(2, 3).flatten(1, 2)


def _unfolded(out_RQSE: Tensor, length: int) -> Tensor:
    return out_RQSE.unflatten(1, (length, -1)).transpose(2, 3).flatten(2, 3)


def _mixed(ends_R: Tensor, cached: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> Tensor:
    """Both results [R,Q,S,E] as one, by their weights. What the sum of a row without a cached key says does not count,
    and its result is zero."""
    (cached_RQSE, cached_RSQ), (own_RQSE, own_RSQ) = cached, own
    share_RSQ = (own_RSQ - cached_RSQ).sigmoid().where((ends_R > 0)[:, None, None], 1.0)
    return torch.lerp(cached_RQSE, own_RQSE, share_RSQ.transpose(1, 2)[..., None].to(own_RQSE.dtype))


def flash_attn(module: Any) -> ByTable:
    """Over the module `flash_attn`. It refuses pages that do not hold a multiple of 256 positions."""
    with_kvcache = module.flash_attn_with_kvcache

    def kernel(
        queries_RLHE: Tensor, keys: Tensor, values: Tensor, ends_R: Tensor, table_RZ: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = with_kvcache(
            queries_RLHE,
            keys,
            values,
            cache_seqlens=ends_R,
            block_table=table_RZ,
            causal=causal,
            return_softmax_lse=True,
        )
        return out

    return kernel


def varlen_attn(module: Any) -> ByTable:
    """Over the module `torch.nn.attention.varlen`. Rows of one length are packed as they lie.

    Keys are not split among thread blocks: with torch 2.13 split keys of paged memory have been reported as NaN.
    """

    def kernel(
        queries_RLHE: Tensor, keys: Tensor, values: Tensor, ends_R: Tensor, table_RZ: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        rows, length = queries_RLHE.shape[:2]
        room = keys.shape[1] * (1 if table_RZ is None else table_RZ.shape[1])
        row = torch.arange(rows + 1, device=ends_R.device, dtype=ends_R.dtype)
        out, sums_HT = module.varlen_attn(
            queries_RLHE.flatten(0, 1),
            *((keys, values) if table_RZ is not None else (keys.flatten(0, 1), values.flatten(0, 1))),
            row * length,
            row * room,
            length,
            room,
            return_aux=module.AuxRequest(lse=True),
            window_size=(-1, 0 if causal else -1),
            enable_gqa=True,
            seqused_k=ends_R,
            block_table=table_RZ,
            num_splits=1,
        )
        return out.unflatten(0, (rows, length)), sums_HT.unflatten(1, (rows, length)).transpose(0, 1)

    return kernel


def flash_misfit(module: Any) -> str | None:
    """Why this flash-attn reads no pages; None where it does."""
    return _misfit(module.flash_attn_with_kvcache, "block_table", "return_softmax_lse")


def varlen_misfit(module: Any) -> str | None:
    """Why this torch's function reads no pages; None where its signature says that it does."""
    return _misfit(module.varlen_attn, "seqused_k", "block_table", "num_splits")


def _misfit(function: Callable[..., Any], *wanted: str) -> str | None:
    missing = [name for name in wanted if name not in inspect.signature(function).parameters]
    return f"{function.__name__} has no {' and no '.join(missing)}" if missing else None
