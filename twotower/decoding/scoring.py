"""Scores of given tokens under a tower's logits: log-probabilities, and whether each token is the greedy choice."""

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.decoding.margins import runner_up


@dataclass(frozen=True, slots=True)
class Scored:
    """For each position: the given token's log-probability, whether the token is the greedy one, and the margin of that
    decision. `finite_P`: whether all logits are finite; if not, the other three are undefined.
    """

    log_prob_P: Tensor
    is_greedy_P: Tensor
    margin_P: Tensor
    finite_P: Tensor


def score(logits_PV: Tensor, tokens_P: Tensor) -> Scored:
    """Scores one token per row of fp32 logits. As in `sample`, the lowest id is the greedy one on a tie."""
    log_probs_PV = logits_PV.log_softmax(-1)
    finite_P = torch.isfinite(log_probs_PV).all(1)
    given_P1 = log_probs_PV.gather(1, tokens_P[:, None])
    best_other_P = runner_up(log_probs_PV, tokens_P[:, None], -torch.inf)
    return Scored(
        log_prob_P=given_P1[:, 0],
        is_greedy_P=logits_PV.max(-1).indices == tokens_P,
        margin_P=-torch.expm1(-(given_P1[:, 0] - best_other_P).abs()),
        finite_P=finite_P,
    )
