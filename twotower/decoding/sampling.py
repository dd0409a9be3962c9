"""The next token of causal modes (`ar`, `mock_ar`): greedy, or temperature with top-k, top-p and min-p, per row."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from twotower.core import GREEDY_BELOW, DecodingParams
from twotower.decoding.margins import runner_up
from twotower.decoding.randomness import step_key, uniform
from twotower.decoding.steering import Steered, steer
from twotower.model.transfer import on_device

_SMALLEST = 1e-38
_MISS = 4.0  # a sum of probabilities moves by a quarter of the logits' difference at most


@dataclass(frozen=True, slots=True)
class TokenParams:
    """How one row samples. `top_k` 0, `top_p` 1 and `min_p` 0 are off; `key` names this position's random number.
    `steered`: what the request does to the logits before."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    key: int = 0
    min_p: float = 0.0
    steered: Steered | None = None

    @classmethod
    def of(cls, params: DecodingParams, place: int, steered: Steered | None = None) -> Self:
        """Of the answer's token at `place`, in every causal mode."""
        key = step_key(params.seed, place, 0) if params.samples else 0
        return cls(params.temperature, params.top_k, params.top_p, key, params.min_p, steered)

    @property
    def cuts(self) -> bool:
        """Whether some tokens are out of the question."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token id for each row, and the margin in [0, 1] of that decision."""

    tokens_R: Tensor
    margin_R: Tensor


def sample(logits_RV: Tensor, rows: list[TokenParams]) -> Sampled:
    """One token per row of fp32 logits. Greedy takes the lowest index on a tie."""
    best_R, tokens_R = logits_RV.max(-1)
    margin_R = -torch.expm1(runner_up(logits_RV.clone(), tokens_R[:, None], -torch.inf) - best_R)
    sampled = [r for r, row in enumerate(rows) if row.temperature >= GREEDY_BELOW]
    if sampled:
        which_M = on_device(sampled, logits_RV.device)
        drawn = _draw(logits_RV[which_M], [rows[r] for r in sampled])
        tokens_R = tokens_R.index_copy(0, which_M, drawn.tokens_R)
        margin_R = margin_R.index_copy(0, which_M, drawn.margin_R)
    return Sampled(tokens_R, margin_R)


def decide(logits_RV: Tensor, rows: list[TokenParams]) -> Tensor:
    """`sample` after what rows do to their logits, as the host reads it, [R,3] in fp32: the token, its margin, whether
    the tower's logits of the row are all finite and leave a token to choose. Leaves the logits as they are."""
    finite_R = torch.isfinite(logits_RV).all(1)
    steered_RV = steer(logits_RV, [row.steered for row in rows])
    if steered_RV is not logits_RV:
        finite_R &= steered_RV.amax(1).isfinite()  # -inf is a token that may not be
    sampled = sample(steered_RV, rows)
    return torch.stack([sampled.tokens_R.float(), sampled.margin_R, finite_R.float()], dim=1)


def _draw(logits_RV: Tensor, rows: list[TokenParams]) -> Sampled:
    """softmax at the temperature, then top-k, min-p and top-p, then one draw.

    The draw goes through the tokens in the order of their ids. In the order of their probabilities, the last
    bit of a logit would make two of almost the same probability change places, and so change the draw.
    """
    device, vocab = logits_RV.device, logits_RV.shape[1]
    temperatures_R1 = on_device([row.temperature for row in rows], device)[:, None]
    largest_R1 = logits_RV.amax(1, keepdim=True)
    # Nothing can be drawn from a row with NaN, with inf, or without a token. The host does not know of it yet.
    dead_R1 = ~largest_R1.isfinite()
    logits_RV, largest_R1 = logits_RV.masked_fill(dead_R1, 0.0), largest_R1.masked_fill(dead_R1, 0.0)
    # The likeliest token's logit is subtracted where the quotient would leave fp32.
    beyond_R1 = (largest_R1 / temperatures_R1).isinf()
    kept_RV = ((logits_RV - largest_R1.masked_fill(~beyond_R1, 0.0)) / temperatures_R1).softmax(-1)
    cut = _cut(kept_RV, rows) if any(row.cuts for row in rows) else None
    if cut is not None:
        kept_RV = cut.kept_RV
    total_RV = kept_RV.cumsum(-1)
    u_R1 = uniform([row.key for row in rows], [0] * len(rows), 1, device) * total_RV[:, -1:]
    # `right`: a draw of exactly 0 must not pick a token of zero probability.
    place_R1 = torch.searchsorted(total_RV, u_R1, right=True).clamp(max=vocab - 1)
    above_R1 = total_RV.gather(1, place_R1) - u_R1
    miss_R1 = torch.minimum(above_R1, kept_RV.gather(1, place_R1) - above_R1).clamp(min=0) / total_RV[:, -1:]
    margin_R1 = _MISS * miss_R1
    if cut is not None:
        # Another cut moves the draw's bounds by a token or so.
        decided_R1 = miss_R1 <= 2 * cut.edge_R1 / total_RV[:, -1:]
        margin_R1 = torch.minimum(margin_R1, cut.margin_R1.masked_fill(~decided_R1, 1.0))
    # In units of logits; above a temperature of 1 it is the probabilities' own rounding that counts.
    return Sampled(place_R1[:, 0], (margin_R1 * temperatures_R1.clamp(max=1))[:, 0].clamp(max=1))


@dataclass(frozen=True, slots=True)
class _Cut:
    """Probabilities [R,V] without the tokens cut off, the margin of that, and the least probability that was kept."""

    kept_RV: Tensor
    margin_R1: Tensor
    edge_R1: Tensor


def _cut(probabilities_RV: Tensor, rows: list[TokenParams]) -> _Cut:
    """top-k (ties kept) and min-p, then top-p of what they left (the crossing token kept)."""
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
    # Nobody is behind the last; the ends of both cuts are looked at, and the sum at which top-p crosses.
    behind_RV = torch.cat([sorted_RV[:, 1:], torch.zeros_like(kth_R1)], dim=1)
    end_R1 = (kept_RV > 0).sum(-1, keepdim=True) - 1
    ends_R2 = torch.cat([on_device(last, device)[:, None], end_R1], dim=1)
    ahead_R2 = sorted_RV.gather(1, ends_R2).clamp(min=_SMALLEST)
    ratio_R1 = (behind_RV.gather(1, ends_R2) / ahead_R2).amax(1, keepdim=True)
    crossing_R1 = (before_RV[:, 1:] - top_p_R1).abs().amin(1, keepdim=True).masked_fill(top_p_R1 >= 1, 1.0)
    margin_R1 = torch.minimum(1 - ratio_R1, _MISS * crossing_R1)
    if any(row.min_p for row in rows):
        apart_RV = torch.minimum(sorted_RV, least_R1) / torch.maximum(sorted_RV, least_R1).clamp(min=_SMALLEST)
        margin_R1 = torch.minimum(margin_R1, 1 - apart_RV.amax(1, keepdim=True).masked_fill(least_R1 == 0, 0.0))
    return _Cut(torch.zeros_like(kept_RV).scatter_(1, order_RV, kept_RV), margin_R1, kept_RV.gather(1, end_R1))
