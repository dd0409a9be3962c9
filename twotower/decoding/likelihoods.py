"""Log-probabilities of tokens under a tower's raw logits, packed for the host: beside the choice of tokens, or for
given tokens.

Temperature, top-k and top-p do not change them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.core import Likelihood
from twotower.model.transfer import on_device

_HEAD = 2  # columns before those of the alternatives


def rate(logits_PV: Tensor, tokens_P: Tensor, most: int) -> Tensor:
    """One token per row of fp32 logits, as `likelihood_of` reads it: [P, 2 + 2A] in fp32, A = min(`most`, V).

    The columns: the token's log-probability, whether all logits are finite, the ids of A alternatives, and theirs.
    """
    log_probs_PV = logits_PV.log_softmax(-1)
    given_P1 = log_probs_PV.gather(1, tokens_P[:, None])
    finite_P1 = torch.isfinite(log_probs_PV).all(1, keepdim=True)
    top = log_probs_PV.topk(min(most, logits_PV.shape[1]))
    return torch.cat([given_P1, finite_P1.float(), top.indices.float(), top.values], dim=1)


def beside(told_RC: Tensor, logits_RV: Tensor, tokens_R: Tensor, asked: Sequence[int], most: int) -> Tensor:
    """The given columns of each row, followed by the ratings of the tokens in rows `asked`. In other rows nothing is
    computed and the rating columns are undefined.
    """
    width = _HEAD + 2 * min(most, logits_RV.shape[1])
    rated_RC = told_RC.new_zeros(len(told_RC), width)
    if asked:
        which_M = on_device(list(asked), logits_RV.device)
        rated_RC = rated_RC.index_copy(0, which_M, rate(logits_RV[which_M], tokens_R[which_M], most))
    return torch.cat([told_RC, rated_RC], dim=1)


def is_finite(row: Sequence[float]) -> bool:
    """Whether a row of `rate` is defined."""
    return bool(row[1])


def likelihood_of(row: Sequence[float], alternatives: int) -> Likelihood:
    """The Likelihood in a row of `rate` on the host, with so many of its alternatives."""
    most = (len(row) - _HEAD) // 2
    ids, log_probs = row[_HEAD : _HEAD + most], row[_HEAD + most :]
    return Likelihood(row[0], tuple(map(int, ids[:alternatives])), tuple(log_probs[:alternatives]))
