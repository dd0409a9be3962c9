"""From answers to advice: how good each γ is, how sure that is, and which one to take. Only arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.cli.tune.questions import Question
from cluster.cli.tune.sweep import Answered, Pass
from twotower.core import Mode
from twotower.errors import TwoTowerError
from twotower.showing import show

_Shares = np.ndarray[tuple[int], np.dtype[np.float64]]
_RESAMPLES = 2000
_AS_MANY = 0.01  # of tokens per step: a negligible difference
_UNLIKELY = 0.025  # the share below a 95 % interval


@dataclass(frozen=True, slots=True)
class Rated:
    """One way's figures. Quality is a share of `ar`'s, with the ends of its 95 % interval. `threshold`: of `diffusion`.

    `accuracy`: share of exactly right answers, None where nobody gave any. `agreement`: mean share of `ar`'s tokens
    that come first and are the same.
    """

    threshold: float | None
    accuracy: float | None
    quality: float
    low: float
    high: float
    agreement: float
    tokens_per_s: float
    times_ar: float
    tokens_per_step: float


@dataclass(frozen=True, slots=True)
class Advice:
    """The γ to take; None: none keeps the floor. `more_prompts`: about how many more would settle a doubt; 0: none.

    `slower_than_ar`: every γ that keeps the floor gave fewer tokens per second than `ar`.
    """

    threshold: float | None
    more_prompts: int = 0
    slower_than_ar: bool = False


@dataclass(frozen=True, slots=True)
class Lossless:
    """How `verified`, which gives `ar`'s own answers, compares. `mode`: the one to take, of all that were measured.

    `same_as_ar`: every answer had `ar`'s tokens. `against`: its tokens per second, as a multiple of what would be taken
    without it: the advised γ, else `ar`.
    """

    mode: Mode
    same_as_ar: bool
    against: float


class NothingRight(TwoTowerError):
    """`ar` got no answer right: the wrong service, or answers in another form. There is nothing to keep a share of."""

    def __init__(self, question: Question, answered: Answered) -> None:
        super().__init__(
            f"ar gets none of the answers right; line {question.line}: got {show(answered.text)}, wanted "
            f"{show(question.answer)}. Is this the right service, and are the answers what it should write?"
        )


def rate(questions: Sequence[Question], passes: Sequence[Pass]) -> list[Rated]:
    """Figures of every pass, `ar` first. A question's answer decides where there is one, else `ar`'s own tokens do.

    Raises NothingRight.
    """
    ar = passes[0]
    reference = _right(questions, ar, ar)
    if not reference.any():
        raise NothingRight(questions[0], ar.answers[0])
    return [_rated(questions, one, ar, reference) for one in passes]


def advise(rated: Sequence[Rated], floor: float, prompts: int) -> Advice:
    """The γ with most tokens per step whose quality is at least `floor`; where several have as many, the most careful.

    Not that with most tokens per second: those differ from pass to pass by more than neighbouring γ do, steps do not.
    """
    keeping = [one for one in rated[1:] if one.quality >= floor]
    if not keeping:
        return Advice(None)
    most = max(one.tokens_per_step for one in keeping)
    even = [one for one in keeping if one.tokens_per_step >= (1 - _AS_MANY) * most]
    best = max(even, key=lambda one: one.threshold or 0.0)
    slower = all(one.tokens_per_s < rated[0].tokens_per_s for one in keeping)
    return Advice(best.threshold, _more_prompts(best, floor, prompts), slower)


def compare(verified: Rated, rated: Sequence[Rated], advice: Advice) -> Lossless:
    """`verified` wins where it gives `ar`'s own answers no slower than what would be taken without it."""
    other = next((one for one in rated[1:] if one.threshold == advice.threshold), rated[0])
    if advice.slower_than_ar:
        other = rated[0]
    against, same = verified.tokens_per_s / other.tokens_per_s, verified.agreement == 1.0
    without = Mode.AR if other is rated[0] else Mode.DIFFUSION
    return Lossless(Mode.VERIFIED if same and against >= 1 else without, same, against)


def _more_prompts(best: Rated, floor: float, prompts: int) -> int:
    """An interval narrows with the square root of the number of prompts; where nothing was lost, with the number.

    Only a quality above the floor can settle.
    """
    if best.low >= floor or best.quality <= floor:
        return 0
    if best.quality >= 1:
        return max(1, math.ceil(math.log(_UNLIKELY) / math.log(max(floor, _UNLIKELY))) - prompts)
    return math.ceil(prompts * (((best.quality - best.low) / (best.quality - floor)) ** 2 - 1))


def _rated(questions: Sequence[Question], one: Pass, ar: Pass, reference: _Shares) -> Rated:
    right = _right(questions, one, ar)
    low, high = _interval(right, reference)
    agreement = float(np.mean([_leading(a, b) for a, b in zip(one.answers, ar.answers, strict=True)]))
    quality = float(right.mean() / reference.mean())
    accuracy = None if questions[0].answer is None else float(right.mean())
    return Rated(
        one.way.threshold, accuracy, quality, low, high, agreement,
        one.tokens_per_s, one.tokens_per_s / ar.tokens_per_s, one.tokens_per_step,
    )  # fmt: skip


def _right(questions: Sequence[Question], one: Pass, ar: Pass) -> _Shares:
    rows = zip(questions, one.answers, ar.answers, strict=True)
    return np.array([float(_is_right(question, answer, theirs)) for question, answer, theirs in rows])


def _is_right(question: Question, answer: Answered, of_ar: Answered) -> bool:
    if question.answer is not None:
        return answer.text.strip() == question.answer.strip()
    return answer.token_ids == of_ar.token_ids


def _interval(right: _Shares, reference: _Shares) -> tuple[float, float]:
    """Prompts are drawn anew, the same ones for both. No drawing shows a loss that has not happened yet."""
    drawn = np.random.default_rng(0).integers(len(right), size=(_RESAMPLES, len(right)))
    ratios = right[drawn].mean(1) / np.maximum(reference[drawn].mean(1), 1e-9)
    low, high = np.percentile(ratios, (100 * _UNLIKELY, 100 * (1 - _UNLIKELY)))
    return min(float(low), _nothing_lost(int(reference.sum()))), float(high)


def _nothing_lost(prompts: int) -> float:
    """The share kept that would show no loss in so many prompts in one case of forty; at least so much is sure."""
    return float(_UNLIKELY ** (1 / prompts))


def _leading(ours: Answered, theirs: Answered) -> float:
    same = 0
    for a, b in zip(ours.token_ids, theirs.token_ids, strict=False):
        if a != b:
            break
        same += 1
    return same / max(1, len(theirs.token_ids), len(ours.token_ids))
