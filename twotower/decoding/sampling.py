"""The next token of causal modes (`ar`, `mock_ar`): greedy, or temperature with top-k, top-p and min-p, per row."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from twotower.core import GREEDY_BELOW, DecodingParams
from twotower.decoding.bounds import Bounds, cut
from twotower.decoding.margins import CROSSING, runner_up
from twotower.decoding.randomness import step_key, uniform
from twotower.decoding.steering import Steered, steer
from twotower.model.transfer import on_device


@dataclass(frozen=True, slots=True)
class TokenParams:
    """How one row samples. `top_k` 0, `top_p` 1 and `min_p` 0 are off; `key` names this position's random number.
    `steered`: the request's changes to the logits.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    key: int = 0
    min_p: float = 0.0
    steered: Steered | None = None

    @classmethod
    def of(cls, params: DecodingParams, place: int, steered: Steered | None = None) -> Self:
        """The parameters for the answer's token at `place`, in every causal mode."""
        key = step_key(params.seed, place, 0) if params.samples else 0
        return cls(params.temperature, params.top_k, params.top_p, key, params.min_p, steered)

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token id for each row, and the decision's margin in [0, 1]."""

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
    """`sample` with each row's steering, packed for the host as [R,3] in fp32. The columns: the token, its margin, and
    whether the row's logits are all finite and leave a token to choose. Does not change the logits.
    """
    finite_R = torch.isfinite(logits_RV).all(1)
    steered_RV = steer(logits_RV, [row.steered for row in rows])
    if steered_RV is not logits_RV:
        finite_R &= steered_RV.amax(1).isfinite()  # -inf marks a token that is not allowed
    sampled = sample(steered_RV, rows)
    return torch.stack([sampled.tokens_R.float(), sampled.margin_R, finite_R.float()], dim=1)


def _draw(logits_RV: Tensor, rows: list[TokenParams]) -> Sampled:
    """softmax at the temperature, then top-k, min-p and top-p, then one draw.

    The draw goes through the tokens in the order of their ids. In the order of probabilities, the last bit of a logit
    could swap two almost equally likely tokens, and so change the draw.
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
    bounds = [row.bounds for row in rows]
    left = cut(kept_RV, bounds) if any(row.cut for row in bounds) else None
    if left is not None:
        kept_RV = left.kept_RV
    total_RV = kept_RV.cumsum(-1)
    u_R1 = uniform([row.key for row in rows], [0] * len(rows), 1, device) * total_RV[:, -1:]
    # `right`: a draw of exactly 0 must not pick a token of zero probability.
    place_R1 = torch.searchsorted(total_RV, u_R1, right=True).clamp(max=vocab - 1)
    above_R1 = total_RV.gather(1, place_R1) - u_R1
    miss_R1 = torch.minimum(above_R1, kept_RV.gather(1, place_R1) - above_R1).clamp(min=0) / total_RV[:, -1:]
    margin_R1 = CROSSING * miss_R1
    if left is not None:
        # Another cut moves the draw's bounds by a token or so.
        decided_R1 = miss_R1 <= 2 * left.edge_R1 / total_RV[:, -1:]
        margin_R1 = torch.minimum(margin_R1, left.margin_R1.masked_fill(~decided_R1, 1.0))
    # In units of logits; above a temperature of 1 the rounding of the probabilities counts.
    return Sampled(place_R1[:, 0], (margin_R1 * temperatures_R1.clamp(max=1))[:, 0].clamp(max=1))
