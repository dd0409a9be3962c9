"""One diffusion step's decision: what each masked position would become, and which of them are fixed now.

Follows the released script (semantics §7.4) with every parameter per row: a row's result depends on that row alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.decoding.randomness import uniform
from twotower.decoding.sampling import GREEDY_BELOW
from twotower.model.transfer import on_device

MASK_TOKEN_ID = 3
_BANNED = -1e12
_NOISE_NUMBERS = 1 << 24


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
    """

    tokens_RL: Tensor
    committed_RL: Tensor
    predicted_RL: Tensor
    confidence_RL: Tensor
    finite_R: Tensor


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
    finite_R = torch.isfinite(logits_RLV).flatten(1).all(1)
    logits_RLV = logits_RLV.index_fill(2, on_device([mask_token_id], logits_RLV.device), _BANNED)
    probabilities_RLV = logits_RLV.softmax(-1)
    predicted_RL = probabilities_RLV.argmax(-1)
    sampled = [r for r, row in enumerate(rows) if row.temperature >= GREEDY_BELOW]
    if sampled:
        which_M = on_device(sampled, logits_RLV.device)
        drawn_ML = _gumbel_argmax(logits_RLV[which_M], [rows[r] for r in sampled], noise, sampled)
        predicted_RL = predicted_RL.index_copy(0, which_M, drawn_ML)
    confidence_RL = probabilities_RLV.gather(2, predicted_RL[..., None])[..., 0]
    committed_RL = _choose(confidence_RL, masked_RL, rows)
    out_RL = torch.where(committed_RL, predicted_RL, tokens_RL)
    return Unmasked(out_RL, committed_RL, predicted_RL, confidence_RL, finite_R)


def _gumbel_argmax(logits: Tensor, rows: list[StepParams], noise: Tensor | None, sampled: list[int]) -> Tensor:
    """A few rows at a time: the random numbers of many rows over a large vocabulary would fill gigabytes."""
    at_once = max(1, _NOISE_NUMBERS // logits[0].numel())
    parts = []
    for first in range(0, len(rows), at_once):
        some = slice(first, first + at_once)
        given = None if noise is None else noise[sampled[some]]
        parts.append(_gumbel_argmax_of(logits[some], rows[some], given))
    return torch.cat(parts)


def _gumbel_argmax_of(logits: Tensor, rows: list[StepParams], u: Tensor | None) -> Tensor:
    temperatures = on_device([row.temperature for row in rows], logits.device)
    if u is None:
        u = uniform([row.key for row in rows], logits.shape[1], logits.shape[2], logits.device)
    gumbel = -torch.log(-torch.log(u.clamp(min=1e-10)))
    return ((logits / temperatures[:, None, None]).log_softmax(-1) + gumbel).argmax(-1)


def _choose(confidence_RL: Tensor, masked_RL: Tensor, rows: list[StepParams]) -> Tensor:
    device, width = confidence_RL.device, confidence_RL.shape[1]
    thresholds_R1 = on_device([row.confidence_threshold for row in rows], device)[:, None]
    steps_left_R = on_device([row.steps_left for row in rows], device)
    masked_R = masked_RL.sum(1)
    above_R = ((confidence_RL > thresholds_R1) & masked_RL).sum(1)
    in_time_R = (masked_R + steps_left_R - 1) // steps_left_R
    count_R = torch.minimum(torch.maximum(above_R.clamp(min=1), in_time_R), masked_R)
    order_RL = confidence_RL.masked_fill(~masked_RL, -1.0).argsort(dim=1, stable=True)
    rank_RL = torch.empty_like(order_RL).scatter_(1, order_RL, torch.arange(width, device=device).expand_as(order_RL))
    return (rank_RL >= width - count_R[:, None]) & masked_RL
