"""One diffusion step's decision: what each masked position would become, and which of them are fixed now.

Follows the released script (docs/semantics.md, Modes). Every parameter is per row, so a row's result depends on
that row alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from twotower.config import MASK_TOKEN_ID
from twotower.core import GREEDY_BELOW
from twotower.decoding.certain_prefix import Allowed
from twotower.decoding.margins import closest, runner_up
from twotower.decoding.randomness import uniform
from twotower.decoding.steering import allowed_tokens
from twotower.model.transfer import on_device

_BANNED = -1e12
_NOISE_NUMBERS = 1 << 24
_ABOVE_ZERO = 1e-45  # the smallest fp32 number: a threshold of 0 that can be divided by
_ABSENT = -1.0  # below every confidence
_COLUMNS = 3  # of an outcome, behind those of [R,L]


@dataclass(frozen=True, slots=True)
class StepParams:
    """What one row brings to a step. `steps_left` counts this one; `key` names the step's random numbers. `allowed`:
    what may come at one of its positions."""

    confidence_threshold: float
    steps_left: int
    temperature: float = 0.0
    key: int = 0
    allowed: Allowed | None = None

    @property
    def threshold(self) -> float:
        """One that can be divided by."""
        return max(self.confidence_threshold, _ABOVE_ZERO)

    @property
    def samples(self) -> bool:
        return self.temperature >= GREEDY_BELOW


@dataclass(frozen=True)
class Blocks:
    """R blocks before a step, on the host: tokens, which positions are still masked, parameters."""

    tokens: Sequence[Sequence[int]]
    masked: Sequence[Sequence[bool]]
    rows: Sequence[StepParams]

    @property
    def width(self) -> int:
        """L, that of the widest."""
        return max(map(len, self.tokens))

    @property
    def mask_fractions(self) -> list[float]:
        """t of each."""
        return [sum(mask) / len(mask) for mask in self.masked]

    @cached_property
    def at_least(self) -> list[int]:
        """Positions each row has to fix, however unsure they are: one, and enough to finish in time."""
        return [max(1, -(-sum(mask) // row.steps_left)) for mask, row in zip(self.masked, self.rows, strict=True)]

    @property
    def greedy(self) -> bool:
        return not any(row.samples for row in self.rows)

    @property
    def plain(self) -> bool:
        """Whether what is `given` is all that a step needs of them."""
        return self.greedy and not any(row.allowed is not None for row in self.rows)

    def given(self, device: torch.device, width: int) -> Tensor:
        """What a step needs of them on the device: tokens, masked, threshold and `at_least`, [R,2L+2] in fp32.

        Padded to L = `width` with positions that are not masked.
        """
        given = []
        for ids, mask, row, at_least in zip(self.tokens, self.masked, self.rows, self.at_least, strict=True):
            padding = [0] * (width - len(ids))
            given.append([*ids, *padding, *mask, *padding, row.threshold, at_least])
        return on_device(given, device, torch.float32)

    def read(self, outcome: Sequence[Sequence[float]]) -> "list[Decision]":
        """What a step over these blocks decided, a row each."""
        return [Decision(*row) for row in zip(outcome, self.rows, self.at_least, strict=True)]


class Decision:
    """A row of a step's outcome, as the host reads it; `predicted` and `confidence` mean something at masked positions
    only."""

    __slots__ = ("_at_least", "_outcome", "_threshold", "_width")

    def __init__(self, outcome: Sequence[float], params: StepParams, at_least: int) -> None:
        self._outcome, self._width = outcome, (len(outcome) - _COLUMNS) // 5
        self._threshold, self._at_least = params.threshold, at_least

    def _column(self, number: int) -> Sequence[float]:
        return self._outcome[number * self._width : (number + 1) * self._width]

    @property
    def tokens(self) -> list[int]:
        return list(map(int, self._column(0)))

    @property
    def committed(self) -> list[bool]:
        """Which positions were fixed in this step."""
        return list(map(bool, self._column(1)))

    @property
    def predicted(self) -> list[int]:
        return list(map(int, self._column(2)))

    @property
    def confidence(self) -> list[float]:
        return list(self._column(3))

    @property
    def finite(self) -> bool:
        """False where the row's logits hold a NaN or an infinity: nothing else of it counts."""
        return math.isfinite(self._outcome[-1])

    @property
    def margin(self) -> float:
        """That of the step's closest decision, in [0, 1] (`twotower.decoding.margins`)."""
        ordered, above, ratio = self._column(4), int(self._outcome[-3]), self._outcome[-2]
        fixed = min(max(above, self._at_least), self._width)
        least = ordered[-fixed]
        # The best of the others is held off by the threshold or, if nobody is above it, by the least of the fixed ones.
        if fixed < self._width:
            ratio = max(ratio, _divided(ordered[-fixed - 1], min(least, self._threshold)))
        # Where the threshold alone decides how many, the least of the fixed ones had to be above it.
        if above > self._at_least:
            ratio = max(ratio, _divided(self._threshold, least))
        return max(1 - ratio, 0.0)  # the threshold is fp32 on the device and a little off here


def unmask(
    logits_RLV: Tensor, blocks: Blocks, mask_token_id: int = MASK_TOKEN_ID, noise: Tensor | None = None
) -> Tensor:
    """Fix the positions of this step. Returns its outcome, an [R,5L+3] for the host to read at once: see `Decision`.

    A row fixes all positions whose confidence is strictly above its threshold, at least one, and at least enough to
    finish in time. The most confident come first, and of equal ones the later one. `noise` [R,L,V] replaces the uniform
    numbers of sampled rows (for the golden vectors). Overwrites the logits of tokens that may not come.
    """
    _restrict(logits_RLV, blocks.rows)
    given_RX = blocks.given(logits_RLV.device, logits_RLV.shape[1])
    if blocks.greedy:
        return unmask_greedily(logits_RLV, given_RX, mask_token_id)
    sum_R1 = logits_RLV.sum((1, 2))[:, None]
    probabilities_RLV = _without(mask_token_id, logits_RLV).softmax(-1)
    predicted_RL = probabilities_RLV.max(-1).indices
    sampled = [r for r, row in enumerate(blocks.rows) if row.samples]
    which_M = on_device(sampled, logits_RLV.device)
    drawn_ML, drawn_ratio_ML = _gumbel_argmax(
        _of(logits_RLV, which_M), [blocks.rows[r] for r in sampled], noise, sampled
    )
    predicted_RL = _with(predicted_RL, which_M, drawn_ML)
    confidence_RL = probabilities_RLV.gather(2, predicted_RL[..., None])[..., 0]
    chosen = _choose(confidence_RL, given_RX)
    ratio_RL = runner_up(probabilities_RLV, predicted_RL[..., None], 0.0) / confidence_RL
    ratio_RL = _with(ratio_RL, which_M, drawn_ratio_ML)
    # The two likeliest tokens of a position have almost one confidence. Two that were nearly drawn need not. So the
    # other one might have been fixed.
    decided_RL = _with(chosen.committed_RL, which_M, _of(chosen.masked_RL, which_M))
    return _outcome(chosen, predicted_RL, confidence_RL, closest(ratio_RL, decided_RL), sum_R1)


def unmask_greedily(logits_RLV: Tensor, given_RX: Tensor, mask_token_id: int = MASK_TOKEN_ID) -> Tensor:
    """`unmask` where no row samples, from what `Blocks.given` returns: tensors alone, so that it can be recorded."""
    sum_R1 = logits_RLV.sum((1, 2))[:, None]
    probabilities_RLV = _without(mask_token_id, logits_RLV).softmax(-1)
    confidence_RL, predicted_RL = probabilities_RLV.max(-1)
    chosen = _choose(confidence_RL, given_RX)
    ratio_RL = runner_up(probabilities_RLV, predicted_RL[..., None], 0.0) / confidence_RL
    return _outcome(chosen, predicted_RL, confidence_RL, closest(ratio_RL, chosen.committed_RL), sum_R1)


def _restrict(logits_RLV: Tensor, rows: Sequence[StepParams]) -> None:
    """In place, at the positions where not every token may come. NaN and infinity stay what they are, to be found."""
    asked = [(row, params.allowed) for row, params in enumerate(rows) if params.allowed is not None]
    if not asked:
        return
    device = logits_RLV.device
    rows_M, places_M = on_device([[row, allowed.place] for row, allowed in asked], device).unbind(1)
    allowed_MV = allowed_tokens([allowed.bits for _, allowed in asked], logits_RLV.shape[2], device)
    logits_RLV[rows_M, places_M] += torch.where(allowed_MV, 0.0, _BANNED)


def _without(token_id: int, logits_RLV: Tensor) -> Tensor:
    """In place: a copy of the logits of many rows over a large vocabulary would be gigabytes."""
    logits_RLV[..., token_id].fill_(_BANNED)
    return logits_RLV


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Of every row: its tokens and masks before the step, and which positions were fixed. Also the confidences of the
    masked ones in rising order, and how many were above the threshold."""

    tokens_RL: Tensor
    masked_RL: Tensor
    committed_RL: Tensor
    ordered_RL: Tensor
    above_R1: Tensor


def _choose(confidence_RL: Tensor, given_RX: Tensor) -> _Chosen:
    width = confidence_RL.shape[1]
    tokens_RL, masked_RL, threshold_R1, at_least_R1 = given_RX.split([width, width, 1, 1], dim=1)
    masked_RL = masked_RL != 0
    keys_RL = torch.where(masked_RL, confidence_RL, _ABSENT)
    ordered_RL, order_RL = keys_RL.sort(dim=1, stable=True)
    above_R1 = (ordered_RL > threshold_R1).sum(1, keepdim=True)
    fixed_R1 = torch.maximum(above_R1, at_least_R1)
    last_RL = torch.arange(width, 0, -1, device=keys_RL.device) <= fixed_R1
    return _Chosen(tokens_RL, masked_RL, last_RL.scatter(1, order_RL, last_RL), ordered_RL, above_R1)


def _outcome(chosen: _Chosen, predicted_RL: Tensor, confidence_RL: Tensor, ratio_R: Tensor, sum_R1: Tensor) -> Tensor:
    """Side by side, all in fp32, which holds every token id below 2^24. The sum of a row's logits is finite where they
    are."""
    out_RL = torch.where(chosen.committed_RL, predicted_RL, chosen.tokens_RL)
    columns = (chosen.committed_RL, predicted_RL, confidence_RL, chosen.ordered_RL, chosen.above_R1, ratio_R[:, None])
    return torch.cat([out_RL, *columns, sum_R1], dim=1)


def _divided(above: float, below: float) -> float:
    if above <= 0:
        return 0.0  # nobody
    return above / below if below else math.inf


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
