"""Attention by kernels that take numbers of keys instead of a mask: flash-attn's, and the one that torch brings.

Both read the first so many keys of each row. A denoiser's own keys come after everything gathered. They are copied to
right behind their row's cached keys: attention knows no positions, so order is free, but a gap would be seen. Pages are
gathered as for the plain path, because flash-attn's own paging wants pages of 256 tokens.
Seen so far: the Python of both packages over a stand-in for what they compile, never on a GPU.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twotower.model.attention import Attend
from twotower.model.states import Reach

# Queries [R,L,H,E] over the first `ends_R` (int32) of keys and values [R,T,S,E]. Causal: the last query sees all of
# those, each one before it one key fewer.
ByNumber = Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]


def attention(kernel: ByNumber, masked: Attend) -> Attend:
    """`attention.attend` through the kernel; through `masked` where only the mask tells what is seen."""

    def attend(queries_RLHE: Tensor, keys_RTSE: Tensor, values_RTSE: Tensor, reach: Reach) -> Tensor:
        if reach.starts_R is None:
            return masked(queries_RLHE, keys_RTSE, values_RTSE, reach)
        length = queries_RLHE.shape[1]
        if reach.updates:
            ends_R = reach.starts_R + length
        else:
            ends_R = reach.starts_R + (length if reach.lengths_R is None else reach.lengths_R)
            for part_RTSE in (keys_RTSE, values_RTSE):
                _move_own(part_RTSE, reach.starts_R, length)
        # The only query of a pass sees all keys anyway; called causal, it would keep a kernel from folding heads.
        return kernel(queries_RLHE, keys_RTSE, values_RTSE, ends_R.int(), reach.updates and length > 1)

    return attend


def _move_own(part_RTSE: Tensor, starts_R: Tensor, length: int) -> None:
    """The last `length` of the T, to right behind the row's first `starts_R`; in place."""
    own_RLSE = part_RTSE[:, -length:].clone()  # the two places may overlap
    places_RL = starts_R[:, None] + torch.arange(length, device=starts_R.device)
    part_RTSE.scatter_(1, places_RL[..., None, None].expand_as(own_RLSE), own_RLSE)


def flash_attn(module: Any) -> ByNumber:
    """Over the module `flash_attn`. Its keys are a cache of which each row has filled a part."""
    with_kvcache = module.flash_attn_with_kvcache

    def kernel(queries_RLHE: Tensor, keys_RTSE: Tensor, values_RTSE: Tensor, ends_R: Tensor, causal: bool) -> Tensor:
        out: Tensor = with_kvcache(queries_RLHE, keys_RTSE, values_RTSE, cache_seqlens=ends_R, causal=causal)
        return out

    return kernel


def heads_misfit(head_dim: int) -> str | None:
    """Why neither takes heads of this width; None where both do. flash-attn would pad others, all keys at each call."""
    if head_dim <= 256 and head_dim % 8 == 0:
        return None
    return f"flash attention wants heads of a multiple of 8, at most 256, the model has {head_dim}"


def varlen_attn(module: Any) -> ByNumber:
    """Over the module `torch.nn.attention.varlen`. Rows of one length are packed as they lie."""

    def kernel(queries_RLHE: Tensor, keys_RTSE: Tensor, values_RTSE: Tensor, ends_R: Tensor, causal: bool) -> Tensor:
        rows, length, room = *queries_RLHE.shape[:2], keys_RTSE.shape[1]
        row = torch.arange(rows + 1, device=ends_R.device, dtype=ends_R.dtype)
        out: Tensor = module.varlen_attn(
            *(part.flatten(0, 1) for part in (queries_RLHE, keys_RTSE, values_RTSE)),
            row * length,
            row * room,
            length,
            room,
            window_size=(-1, 0 if causal else -1),
            enable_gqa=True,
            seqused_k=ends_R,
        )
        return out.unflatten(0, (rows, length))

    return kernel


def varlen_misfit(module: Any) -> str | None:
    """Why torch's function cannot be told how many keys each row has; None where it can."""
    if "seqused_k" in inspect.signature(module.varlen_attn).parameters:
        return None
    return f"torch {torch.__version__} has a varlen_attn without seqused_k"
