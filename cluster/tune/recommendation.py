"""From answers to advice: how good each γ is, how sure that is, and which of them to take. Arithmetic alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.tune.questions import Question
from cluster.tune.sweep import Answered, Pass

_Shares = np.ndarray[tuple[int], np.dtype[np.float64]]
_RESAMPLES = 2000
_AS_MANY = 0.01  # of tokens per step: a difference that nobody notices


@dataclass(frozen=True, slots=True)
class Rated:
    """One way's figures. Quality is a share of `ar`'s, with the ends of its 95 % bootstrap interval.

    `agreement`: mean share of `ar`'s tokens that come first and are the same.
    """

    threshold: float | None
    quality: float
    low: float
    high: float
    agreement: float
    tokens_per_s: float
    times_ar: float
    tokens_per_step: float


@dataclass(frozen=True, slots=True)
class Advice:
    """The γ to take; None: none keeps the floor. `more_prompts`: about how many more would settle a doubt; 0: none."""

    threshold: float | None
    more_prompts: int = 0
    slower_than_ar: bool = False


def rate(questions: Sequence[Question], passes: Sequence[Pass]) -> list[Rated]:
    """Figures of every pass, `ar` first. A question's answer decides where there is one, else `ar`'s own tokens do."""
    ar = passes[0]
    reference = _right(questions, ar, ar)
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
    return Advice(best.threshold, _more_prompts(best, floor, prompts), best.tokens_per_s < rated[0].tokens_per_s)


def _more_prompts(best: Rated, floor: float, prompts: int) -> int:
    """An interval narrows with the square root of the number of prompts. Only a quality above the floor can settle."""
    if best.low >= floor or best.quality <= floor:
        return 0
    return math.ceil(prompts * (((best.quality - best.low) / (best.quality - floor)) ** 2 - 1))


def _rated(questions: Sequence[Question], one: Pass, ar: Pass, reference: _Shares) -> Rated:
    right = _right(questions, one, ar)
    low, high = _interval(right, reference)
    agreement = float(np.mean([_leading(a, b) for a, b in zip(one.answers, ar.answers, strict=True)]))
    quality = float(right.mean() / max(reference.mean(), 1e-9))
    return Rated(
        one.threshold, quality, low, high, agreement,
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
    """Prompts are drawn anew, the same ones for both."""
    drawn = np.random.default_rng(0).integers(len(right), size=(_RESAMPLES, len(right)))
    ratios = right[drawn].mean(1) / np.maximum(reference[drawn].mean(1), 1e-9)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)


def _leading(ours: Answered, theirs: Answered) -> float:
    same = 0
    for a, b in zip(ours.token_ids, theirs.token_ids, strict=False):
        if a != b:
            break
        same += 1
    return same / max(1, len(theirs.token_ids), len(ours.token_ids))
