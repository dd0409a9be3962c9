"""Attention over pages where they lie, by flash-attn: nothing is gathered, joined or padded to the longest row.

A pass that extends has its new keys in the pages already: one call, causal. A denoiser's pass must leave the pages as
they are: committed positions are others' too (a prefix's pages, a mirror that a delta is just entering). So the cached
keys and the block's own are two calls, each with the logarithm of its weights' sum, and their results are mixed by
those: softmax over both together is exactly that mix.
Seen so far: flash-attn's Python over a stand-in for what it compiles, never on a GPU.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from twotower.model.attention import AttendInPages
from twotower.model.in_pages import InPages, Own


def flash_attn(module: Any) -> AttendInPages:
    """Over the module `flash_attn`. It refuses pages that do not hold a multiple of 256 positions."""
    with_kvcache = module.flash_attn_with_kvcache

    def attend(queries_RLHE: Tensor, seen: InPages) -> Tensor:
        pages = {"k_cache": seen.keys, "v_cache": seen.values, "block_table": seen.table_RZ}
        if seen.own is not None:
            cached = with_kvcache(queries_RLHE, **pages, cache_seqlens=seen.ends_R, return_softmax_lse=True)
            return _mixed(seen.ends_R, cached, _attended(queries_RLHE, seen.own))
        # The only query of a pass sees all keys anyway; called causal, it would keep the kernel from folding heads.
        out: Tensor = with_kvcache(queries_RLHE, **pages, cache_seqlens=seen.ends_R, causal=queries_RLHE.shape[1] > 1)
        return out

    def _attended(queries_RLHE: Tensor, own: Own) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = with_kvcache(
            queries_RLHE, own.keys, own.values, cache_seqlens=own.lengths_R, return_softmax_lse=True
        )
        return out

    return attend


def _mixed(ends_R: Tensor, cached: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> Tensor:
    """Both results [R,L,H,E] as one, by what they say of their weights [R,H,L]. A row without a cached key says
    nothing that counts, and its result is zero."""
    (cached_RLHE, cached_RHL), (own_RLHE, own_RHL) = cached, own
    share_RHL = (own_RHL - cached_RHL).sigmoid().where((ends_R > 0)[:, None, None], 1.0)
    return torch.lerp(cached_RLHE, own_RLHE, share_RHL.transpose(1, 2)[..., None].to(own_RLHE.dtype))


def misfit(module: Any) -> str | None:
    """Why this flash-attn reads no pages; None where it does."""
    known = inspect.signature(module.flash_attn_with_kvcache).parameters
    missing = [name for name in ("block_table", "return_softmax_lse") if name not in known]
    if not missing:
        return None
    return f"flash_attn has a flash_attn_with_kvcache without {' and '.join(missing)}"
