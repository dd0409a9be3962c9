"""Guesses for masked positions: token, confidence, and how close the decision was.

P positions of any rows are handled together, and each result depends only on its own position. Logits are a step's
largest tensor. So only logits of masked positions are made, `positions_at_once` at a time; tensors computed from them
are at most as large.

A guess is a row of [P,4] in fp32: token id, confidence, the ratio of runner-up to winner, and the sum of the logits.
The sum is finite if the logits are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.decoding.bounds import Bounds, cut
from twotower.decoding.margins import runner_up
from twotower.decoding.randomness import uniform
from twotower.decoding.steering import allowed_tokens
from twotower.model.transfer import on_device

AT_ONCE = 1 << 24  # logits: 64 MiB in fp32
_SORTED = 4  # a bounded draw takes so many times the memory of a free one: for sorted tokens and their places
_BANNED = -1e12


def positions_at_once(vocab: int) -> int:
    return max(1, AT_ONCE // vocab)


def bounded_at_once(at_once: int) -> int:
    """The number of positions with bounded draws in a piece, if a piece of others has so many."""
    return max(1, at_once // _SORTED)


@dataclass(frozen=True, slots=True)
class Draw:
    """How positions are drawn: one number each, at `positions` of their blocks. `key` names a step's random numbers.
    `bounds`: the allowed tokens of each draw; None: all tokens, at every position.
    """

    temperatures: Sequence[float]
    keys: Sequence[int]
    positions: Sequence[int]
    bounds: Sequence[Bounds] | None = None


def restrict(logits_PV: Tensor, asked: Sequence[tuple[int, bytes]]) -> None:
    """Exclude tokens in place, at the restricted positions: which position, and a bit for each token. NaN and infinity
    stay, so that they are found later.
    """
    if not asked:
        return
    which, bits = zip(*asked, strict=True)
    allowed_MV = allowed_tokens(bits, logits_PV.shape[1], logits_PV.device)
    added_MV = torch.where(allowed_MV, 0.0, _BANNED).to(logits_PV.dtype)
    logits_PV[on_device(which, logits_PV.device)] += added_MV


def likeliest(logits_PV: Tensor, mask_token_id: int) -> Tensor:
    """Guesses without a draw. Uses tensors only, so that it can be recorded. Overwrites the mask token's logits."""
    sum_P = logits_PV.sum(1)
    probabilities_PV = _without(mask_token_id, logits_PV).softmax(1)
    confidence_P, tokens_P = probabilities_PV.max(1)
    ratio_P = runner_up(probabilities_PV, tokens_P[:, None], 0.0) / confidence_P
    return torch.stack([tokens_P.float(), confidence_P, ratio_P, sum_P], dim=1)


def drawn(logits_PV: Tensor, mask_token_id: int, draw: Draw, noise_PV: Tensor | None = None) -> Tensor:
    """Guesses by the Gumbel-max method, among the tokens that the bounds keep of the distribution at its temperature.
    The confidence is the token's probability at temperature 1 among all tokens. The ratio is of two tokens' weights, at
    which the other would have been drawn. `noise_PV` replaces the uniform numbers. Overwrites the mask token's logits.
    """
    sum_P = logits_PV.sum(1)
    tokens_P, ratio_P = _gumbel_argmax(_without(mask_token_id, logits_PV), draw, noise_PV)
    confidence_P = logits_PV.softmax(1).gather(1, tokens_P[:, None])[:, 0]
    return torch.stack([tokens_P.float(), confidence_P, ratio_P, sum_P], dim=1)


def _without(token_id: int, logits_PV: Tensor) -> Tensor:
    logits_PV[:, token_id].fill_(_BANNED)
    return logits_PV


def _gumbel_argmax(logits_PV: Tensor, draw: Draw, noise_PV: Tensor | None) -> tuple[Tensor, Tensor]:
    temperatures_P = on_device(draw.temperatures, logits_PV.device)
    scores_PV = (logits_PV / temperatures_P[:, None]).log_softmax(1)
    if noise_PV is None:
        noise_PV = uniform(draw.keys, draw.positions, logits_PV.shape[1], logits_PV.device)
    scores_PV.add_(noise_PV.clamp_(min=1e-10).log_().neg_().log_().neg_())
    # In units of logits; above a temperature of 1 the rounding of the score counts.
    unit_P = temperatures_P.clamp(max=1)
    if draw.bounds is not None:
        return _best_within(draw.bounds, scores_PV, (logits_PV / temperatures_P[:, None]).softmax(1), unit_P)
    best_P, tokens_P = scores_PV.max(1)
    gap_P = best_P - runner_up(scores_PV, tokens_P[:, None], -torch.inf)
    return tokens_P, torch.exp(-gap_P * unit_P)


def _best_within(
    bounds: Sequence[Bounds], scores_PV: Tensor, probabilities_PV: Tensor, unit_P: Tensor
) -> tuple[Tensor, Tensor]:
    """The highest score among the remaining tokens: a draw in proportion to their probabilities.

    The cut matters if the winner is one of the last kept tokens, or if one of the first excluded tokens has a higher
    score.
    """
    left = cut(probabilities_PV, bounds)
    out_PV = left.kept_RV <= 0
    inside_PV = scores_PV.masked_fill(out_PV, -torch.inf)
    best_P, tokens_P = inside_PV.max(1)
    gap_P = best_P - runner_up(inside_PV, tokens_P[:, None], -torch.inf)
    first_out_P1 = probabilities_PV.masked_fill(~out_PV, 0.0).amax(1, keepdim=True)
    far_PV = ~out_PV | (2 * probabilities_PV < first_out_P1)
    rival_P = torch.exp((scores_PV.masked_fill_(far_PV, -torch.inf).amax(1) - best_P) * unit_P).clamp(max=1)
    is_last_P = (left.kept_RV.gather(1, tokens_P[:, None]) <= 2 * left.edge_R1)[:, 0]
    other_cut_P = (1 - left.margin_R1[:, 0] * unit_P).clamp(min=0)
    by_cut_P = torch.minimum(other_cut_P, rival_P.masked_fill(is_last_P, 1.0))
    return tokens_P, torch.maximum(torch.exp(-gap_P * unit_P), by_cut_P)
