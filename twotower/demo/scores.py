"""What a checkpoint got right and how fast its blocks filled: counts, ratios and intervals. Knows no model.

A *way* is how answers were decoded: a mode, for `diffusion` with its threshold and steps per block.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from twotower.core import DecodingParams, Mode

MAX_NEW_TOKENS = 256  # a block more than the longest answer of the corpus
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
FEWER_STEPS = (4, 8)
_RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Way:
    """How answers are decoded: greedily, in blocks of 16."""

    mode: Mode
    confidence_threshold: float = 0.8
    steps_per_block: int = 16

    def __str__(self) -> str:
        if self.mode is not Mode.DIFFUSION:
            return str(self.mode)
        fewer = "" if self.steps_per_block == 16 else f" T {self.steps_per_block}"
        return f"diffusion {self.confidence_threshold:g}{fewer}"

    def params(self, max_new_tokens: int = MAX_NEW_TOKENS) -> DecodingParams:
        """What a request asks for."""
        return DecodingParams(
            mode=self.mode,
            max_new_tokens=max_new_tokens,
            confidence_threshold=self.confidence_threshold,
            steps_per_block=self.steps_per_block,
        )


AR, MOCK_AR, VERIFIED, USUAL = Way(Mode.AR), Way(Mode.MOCK_AR), Way(Mode.VERIFIED), Way(Mode.DIFFUSION)


def every_way() -> list[Way]:
    """Both causal modes, `verified`, all thresholds, and fewer steps at the usual threshold."""
    swept = [Way(Mode.DIFFUSION, threshold) for threshold in THRESHOLDS]
    return [AR, MOCK_AR, VERIFIED, *swept, *(Way(Mode.DIFFUSION, 0.8, steps) for steps in FEWER_STEPS)]


@dataclass(frozen=True)
class Answer:
    """What came of one instance. `block_steps`: passes of the deciding tower for each block, for each token in the
    causal modes, for each round in `verified`. `num_tokens` counts eos too; what a block holds behind eos counts as
    nothing. `digest` is the same for the same tokens.
    """

    right: bool
    num_tokens: int
    block_steps: tuple[int, ...]
    digest: str = ""


@dataclass(frozen=True)
class Score:
    """One family decoded in one way, instance by instance."""

    family: str
    way: str
    answers: tuple[Answer, ...]

    @property
    def accuracy(self) -> float:
        """Share of exactly right answers."""
        return sum(answer.right for answer in self.answers) / len(self.answers)


def tokens_per_step(scores: Iterable[Score]) -> float:
    """Tokens up to eos per pass of the deciding tower, over all answers together; in `verified` per round."""
    answers = [answer for score in scores for answer in score.answers]
    return sum(a.num_tokens for a in answers) / max(1, sum(sum(a.block_steps) for a in answers))


def mean_accuracy(scores: Iterable[Score]) -> float:
    """Mean over families, each of the same weight."""
    return float(np.mean([score.accuracy for score in scores]))


def identical(scores: Iterable[Score], reference: Iterable[Score]) -> float:
    """Share of the answers that have the reference's tokens; both answered the same instances in the same order."""
    pairs = [
        (ours.digest, theirs.digest)
        for score, other in zip(scores, reference, strict=True)
        for ours, theirs in zip(score.answers, other.answers, strict=True)
    ]
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs)


class BlockSteps(NamedTuple):
    """Mean steps of all answers' blocks at one place."""

    mean_steps: float
    num_blocks: int


def steps_by_block(scores: Iterable[Score]) -> list[BlockSteps]:
    """The steps of first blocks, second blocks, …: in the order of a block's place in its answer."""
    columns: list[list[int]] = []
    for steps in (answer.block_steps for score in scores for answer in score.answers):
        columns += [[] for _ in range(len(steps) - len(columns))]
        for column, count in zip(columns, steps, strict=False):
            column.append(count)
    return [BlockSteps(float(np.mean(column)), len(column)) for column in columns]


class Ratio(NamedTuple):
    """A ratio with the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Retained:
    """Quality kept against `ar`: ratio of the mean accuracies, and mean of the families' ratios."""

    of_means: Ratio
    mean_of_ratios: Ratio


def retained(scores: Sequence[Score], reference: Sequence[Score]) -> Retained:
    """Quality of `scores` against that of `reference`, which answered the same instances in the same order.

    The bootstrap draws instances anew within each family, the same ones for both. No drawing shows a loss that has not
    happened yet. So the lower end is at most the share that would show no loss in one case of forty.
    """
    pairs = [(_right(score), _right(_of_family(reference, score.family))) for score in scores]
    random = np.random.default_rng(0)
    drawn = [_ratios(_redrawn(pairs, random)) for _ in range(_RESAMPLES)]
    ends = np.percentile(np.array(drawn), _INTERVAL, axis=0)
    compared = max(1, int(sum(theirs.sum() for _, theirs in pairs)))
    surest = ((100 - _INTERVAL[1]) / 100) ** (1 / compared)
    both = [Ratio(value, min(float(ends[0, i]), surest), float(ends[1, i])) for i, value in enumerate(_ratios(pairs))]
    return Retained(*both)


_Pair = tuple["np.ndarray[tuple[int], np.dtype[np.bool_]]", "np.ndarray[tuple[int], np.dtype[np.bool_]]"]


def _right(score: Score) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.array([answer.right for answer in score.answers])


def _of_family(scores: Sequence[Score], family: str) -> Score:
    return next(score for score in scores if score.family == family)


def _redrawn(pairs: list[_Pair], random: np.random.Generator) -> list[_Pair]:
    places = [random.integers(len(ours), size=len(ours)) for ours, _ in pairs]
    return [(ours[at], theirs[at]) for (ours, theirs), at in zip(pairs, places, strict=True)]


def _ratios(pairs: list[_Pair]) -> tuple[float, float]:
    """Ratio of means and mean of ratios; a family that the reference never gets right has no ratio."""
    ours, theirs = (np.array([pair[i].mean() for pair in pairs]) for i in (0, 1))
    known = theirs > 0
    if not known.any():
        return 0.0, 0.0
    return float(ours.mean() / theirs.mean()), float((ours[known] / theirs[known]).mean())


def of_way(scores: Iterable[Score], way: Way) -> list[Score]:
    """The scores of one way, in their order."""
    return [score for score in scores if score.way == str(way)]


def table(scores: Sequence[Score]) -> str:
    """A markdown table: a row a family and their mean, accuracy and tokens per step of every way."""
    ways = list(dict.fromkeys(score.way for score in scores))
    families = list(dict.fromkeys(score.family for score in scores))
    rows = [["family", *(f"{way} | tokens/step" for way in ways)], ["---"] * (1 + 2 * len(ways))]
    for family in families:
        rows.append([family, *(_cells([s for s in scores if (s.family, s.way) == (family, w)]) for w in ways)])
    rows.append(["mean", *(_cells([s for s in scores if s.way == way]) for way in ways)])
    return as_markdown(rows)


def as_markdown(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as a markdown table; the second one is the rule."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def to_json(score: Score) -> str:
    """One line."""
    return json.dumps(asdict(score), separators=(",", ":"))


def from_json(line: str) -> Score:
    """What `to_json` wrote."""
    plain = json.loads(line)
    answers = (Answer(a["right"], a["num_tokens"], tuple(a["block_steps"]), a["digest"]) for a in plain["answers"])
    return Score(plain["family"], plain["way"], tuple(answers))


def _cells(scores: list[Score]) -> str:
    return f"{100 * mean_accuracy(scores):.1f} % | {tokens_per_step(scores):.2f}"
