"""Top-k, min-p and top-p: which tokens of a distribution a draw may choose, in every mode.

Knows neither how a token is drawn from the rest nor whose distribution it is. Each row is cut independently.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from twotower.core import DecodingParams
from twotower.decoding.margins import CROSSING, SMALLEST
from twotower.model.transfer import on_device


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of one row's draw. `top_k` 0, `top_p` 1 and `min_p` 0 are off."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def of(cls, params: DecodingParams) -> Self:
        return cls(params.top_k, params.top_p, params.min_p)

    @property
    def cut(self) -> bool:
        """Whether the bounds exclude tokens."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


UNBOUNDED = Bounds()


@dataclass(frozen=True, slots=True)
class Cut:
    """Unnormalised probabilities [R,V], 0 for excluded tokens. `margin_R1`: the margin of the cut, in [0, 1] or more.
    `edge_R1`: the least kept probability.
    """

    kept_RV: Tensor
    margin_R1: Tensor
    edge_R1: Tensor


def cut(probabilities_RV: Tensor, rows: Sequence[Bounds]) -> Cut:
    """Top-k (ties kept) and min-p, then top-p of the rest (the crossing token kept). For a row with NaN the result is
    undefined.
    """
    device, vocab = probabilities_RV.device, probabilities_RV.shape[1]
    sorted_RV, order_RV = probabilities_RV.sort(dim=-1, descending=True, stable=True)
    last = [min(row.top_k or vocab, vocab) - 1 for row in rows]
    kth_R1 = sorted_RV.gather(1, on_device(last, device)[:, None])
    least_R1 = sorted_RV[:, :1] * on_device([row.min_p for row in rows], device)[:, None]
    kept_RV = sorted_RV * ((sorted_RV >= kth_R1) & (sorted_RV >= least_R1))
    kept_RV = kept_RV / kept_RV.sum(-1, keepdim=True)
    top_p_R1 = on_device([row.top_p for row in rows], device)[:, None]
    before_RV = kept_RV.cumsum(-1) - kept_RV
    kept_RV = kept_RV * ((before_RV < top_p_R1) | (top_p_R1 >= 1))
    # No token follows the last one. The margin considers the ends of both cuts, and the sum at which top-p crosses.
    behind_RV = torch.cat([sorted_RV[:, 1:], torch.zeros_like(kth_R1)], dim=1)
    end_R1 = ((kept_RV > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    ends_R2 = torch.cat([on_device(last, device)[:, None], end_R1], dim=1)
    ahead_R2 = sorted_RV.gather(1, ends_R2).clamp(min=SMALLEST)
    ratio_R1 = (behind_RV.gather(1, ends_R2) / ahead_R2).amax(1, keepdim=True)
    crossing_R1 = (before_RV[:, 1:] - top_p_R1).abs().amin(1, keepdim=True).masked_fill(top_p_R1 >= 1, 1.0)
    margin_R1 = torch.minimum(1 - ratio_R1, CROSSING * crossing_R1)
    if any(row.min_p for row in rows):
        # Min-p is relative to the likeliest token, so it never excludes that token.
        others_RV = sorted_RV[:, 1:]
        apart_RV = torch.minimum(others_RV, least_R1) / torch.maximum(others_RV, least_R1).clamp(min=SMALLEST)
        margin_R1 = torch.minimum(margin_R1, 1 - apart_RV.amax(1, keepdim=True).masked_fill(least_R1 == 0, 0.0))
    return Cut(torch.zeros_like(kept_RV).scatter_(1, order_RV, kept_RV), margin_R1, kept_RV.gather(1, end_R1))
