"""One diffusion step's decision: what each masked position would become, and which of them are fixed now.

Follows the released script (semantics §7.4) with every parameter per row: a row's result depends on that row alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.decoding.margins import closest, runner_up
from twotower.decoding.randomness import uniform
from twotower.decoding.sampling import GREEDY_BELOW
from twotower.model.transfer import on_device

MASK_TOKEN_ID = 3
_BANNED = -1e12
_NOISE_NUMBERS = 1 << 24
_ABOVE_ZERO = 1e-45  # the smallest fp32 number: a threshold of 0 that can be divided by


@dataclass(frozen=True, slots=True)
class StepParams:
    """What one row brings to a step. `steps_left` counts this one; `key` names the step's random numbers."""

    confidence_threshold: float
    steps_left: int
    temperature: float = 0.0
    key: int = 0


@dataclass(frozen=True, slots=True)
class Unmasked:
    """A step's outcome, [R,L] each; `predicted` and `confidence` mean something at masked positions only.

    `finite_R` is False for a row whose logits hold a NaN or an infinity; nothing else of that row counts.
    `margin_R` is that of the step's closest decision, in [0, 1].
    """

    tokens_RL: Tensor
    committed_RL: Tensor
    predicted_RL: Tensor
    confidence_RL: Tensor
    finite_R: Tensor
    margin_R: Tensor


def unmask(
    logits_RLV: Tensor,
    tokens_RL: Tensor,
    masked_RL: Tensor,
    rows: list[StepParams],
    mask_token_id: int = MASK_TOKEN_ID,
    noise: Tensor | None = None,
) -> Unmasked:
    """Fix the positions of this step.

    `masked_RL` is True at the row's real, still masked positions. `noise` [R,L,V] replaces the uniform numbers of
    sampled rows (for the golden vectors). A row fixes all positions whose confidence is strictly above its threshold,
    at least one, at least enough to finish in time, the most confident first and among equals the later one first.
    """
    finite_R = (logits_RLV * 0).flatten(1).sum(1) == 0  # NaN where one is not; an eighth of isfinite's time
    logits_RLV = logits_RLV.index_fill(2, on_device([mask_token_id], logits_RLV.device), _BANNED)
    probabilities_RLV = logits_RLV.softmax(-1)
    confidence_RL, predicted_RL = probabilities_RLV.max(-1)
    sampled = [r for r, row in enumerate(rows) if row.temperature >= GREEDY_BELOW]
    if sampled:
        which_M = on_device(sampled, logits_RLV.device)
        drawn_ML, drawn_ratio_ML = _gumbel_argmax(_of(logits_RLV, which_M), [rows[r] for r in sampled], noise, sampled)
        predicted_RL = _with(predicted_RL, which_M, drawn_ML)
        confidence_RL = probabilities_RLV.gather(2, predicted_RL[..., None])[..., 0]
    committed_RL, ratio_R = _choose(confidence_RL, masked_RL, rows)
    out_RL = torch.where(committed_RL, predicted_RL, tokens_RL)
    ratio_RL, decided_RL = runner_up(probabilities_RLV, predicted_RL[..., None], 0.0) / confidence_RL, committed_RL
    if sampled:
        ratio_RL = _with(ratio_RL, which_M, drawn_ratio_ML)
        # The two likeliest tokens of a position have almost one confidence; two that were nearly drawn need not, and
        # the other one might have been fixed.
        decided_RL = _with(committed_RL, which_M, _of(masked_RL, which_M))
    margin_R = 1 - torch.maximum(ratio_R, closest(ratio_RL, decided_RL))
    return Unmasked(out_RL, committed_RL, predicted_RL, confidence_RL, finite_R, margin_R)


def _of(whole_RX: Tensor, which_M: Tensor) -> Tensor:
    """These rows, in order; all of them are the tensor itself."""
    return whole_RX if len(which_M) == len(whole_RX) else whole_RX.index_select(0, which_M)


def _with(whole_RX: Tensor, which_M: Tensor, part_MX: Tensor) -> Tensor:
    """These rows replaced."""
    return part_MX if len(which_M) == len(whole_RX) else whole_RX.index_copy(0, which_M, part_MX)


def _gumbel_argmax(
    logits: Tensor, rows: list[StepParams], noise: Tensor | None, sampled: list[int]
) -> tuple[Tensor, Tensor]:
    """A few rows at a time: the random numbers of many rows over a large vocabulary would fill gigabytes."""
    at_once = max(1, _NOISE_NUMBERS // logits[0].numel())
    parts = []
    for first in range(0, len(rows), at_once):
        some = slice(first, first + at_once)
        given = None if noise is None else noise[sampled[some]]
        parts.append(_gumbel_argmax_of(logits[some], rows[some], given))
    drawn, ratios = zip(*parts, strict=True)
    return torch.cat(drawn), torch.cat(ratios)


def _gumbel_argmax_of(logits: Tensor, rows: list[StepParams], u: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token ids, and the ratios of their weights at which the second would have been drawn, [R,L] each."""
    temperatures = on_device([row.temperature for row in rows], logits.device)[:, None]
    if u is None:
        u = uniform([row.key for row in rows], logits.shape[1], logits.shape[2], logits.device)
    gumbel = u.clamp(min=1e-10).log_().neg_().log_().neg_()
    scores = (logits / temperatures[..., None]).log_softmax(-1).add_(gumbel)
    best, drawn = scores.max(-1)
    gap = best - runner_up(scores, drawn[..., None], -torch.inf)
    # In units of logits; above a temperature of 1 it is the score's own rounding that counts.
    return drawn, torch.exp(-gap * temperatures.clamp(max=1))


def _choose(confidence_RL: Tensor, masked_RL: Tensor, rows: list[StepParams]) -> tuple[Tensor, Tensor]:
    """Which positions are fixed [R,L], and how close it was that these are and no others [R], as a ratio."""
    device, width = confidence_RL.device, confidence_RL.shape[1]
    thresholds = [max(row.confidence_threshold, _ABOVE_ZERO) for row in rows]
    thresholds_R1, steps_left_R1 = on_device([thresholds, [row.steps_left for row in rows]], device)[..., None]
    masked_R1 = masked_RL.sum(1, keepdim=True)
    above_R1 = ((confidence_RL > thresholds_R1) & masked_RL).sum(1, keepdim=True)
    at_least_R1 = ((masked_R1 + steps_left_R1 - 1) // steps_left_R1).clamp_(min=1)
    count_R1 = torch.minimum(torch.maximum(above_R1, at_least_R1), masked_R1)
    keys_RL = confidence_RL.masked_fill(~masked_RL, -1.0)
    order_RL = keys_RL.argsort(dim=1, stable=True)
    rank_RL = torch.empty_like(order_RL).scatter_(1, order_RL, torch.arange(width, device=device).expand_as(order_RL))
    committed_RL = (rank_RL >= width - count_R1) & masked_RL
    # The best of the others is held off by the threshold or, if nobody is above it, by the least of the fixed ones.
    least_R1 = confidence_RL.masked_fill(~committed_RL, 1.0).amin(1, keepdim=True)
    other_R1 = keys_RL.masked_fill(committed_RL, -1.0).amax(1, keepdim=True)
    ratio_R1 = other_R1 / torch.minimum(least_R1, thresholds_R1)
    # Where the threshold alone decides how many, the least of the fixed ones had to be above it.
    alone_R1 = (thresholds_R1 / least_R1).masked_fill_(above_R1 <= at_least_R1, 0.0)
    return committed_RL, torch.maximum(ratio_R1, alone_R1)[:, 0]
