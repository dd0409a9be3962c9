"""How close a decision was, and so whether fp32 rounding could have changed it.

A decision's *margin* is 1 - exp(-d), where d is the difference between the winner's logit and the loser's. It is the
share by which the loser's probability was smaller, and almost d itself where d is small. It lies in [0, 1], and 1 also
stands for a decision without an alternative. Below `NEAR_TIE` the decision is a near-tie: logits of one row alone and
of the same row among others differ by some 3e-6.
"""

from torch import Tensor

NEAR_TIE = 1e-5
CROSSING = 4.0  # a sum of probabilities moves by a quarter of the logits' difference at most
SMALLEST = 1e-38  # a probability that can be divided by


def runner_up(values_X: Tensor, winner_X1: Tensor, below: float) -> Tensor:
    """The largest of the last dimension but the winner's. Overwrites the winner's value with `below`."""
    return values_X.scatter_(-1, winner_X1, below).amax(-1)


def closest(ratios_RL: Tensor, relevant_RL: Tensor) -> Tensor:
    """Each row's largest ratio of runner-up to winner, among its relevant positions."""
    return ratios_RL.masked_fill(~relevant_RL, 0.0).amax(1)
