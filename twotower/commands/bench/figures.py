"""Figures from samples: percentiles, rates, and the spread between rounds."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from twotower.commands.bench.samples import Pass, Sample


@dataclass(frozen=True, slots=True)
class Distribution:
    """A distribution of times in seconds. Percentiles are interpolated between the nearest samples; with `count` 0 all
    are NaN.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Distribution":
        ordered = sorted(values)
        if not ordered:
            return cls(0, math.nan, math.nan, math.nan, math.nan, math.nan)
        p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
        return cls(len(ordered), math.fsum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def percentile(ordered: Sequence[float], share: float) -> float:
    """A percentile of sorted values, by linear interpolation."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over rounds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(math.fsum(values) / len(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Figures:
    """All rounds of one load in one mode. A rate is a round's, over the round's whole time, including its last answers.
    Times cover the samples of all rounds.

    `tokens_per_step`, `accepted_per_round`: None without a step or a round. `sent_late`: how late the load generator
    itself was.
    """

    mode: str
    load: str
    rounds: int
    requests: int
    errors: dict[str, int]
    tokens_per_s: Spread
    requests_per_s: Spread
    first_token: Distribution
    between_blocks: Distribution
    latency: Distribution
    sent_late: Distribution
    tokens_per_answer: float
    tokens_per_step: float | None
    accepted_per_round: float | None
    most_in_flight: int
    client_cpu_share: float

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    def as_json(self) -> dict[str, Any]:
        told: dict[str, Any] = _without_nan(asdict(self))
        return told


def figures_of(passes: Sequence[Pass], default_mode: str) -> Figures:
    """The figures of all rounds of one load in one mode."""
    samples = [sample for one in passes for sample in one.samples]
    good = [sample for one in passes for sample in one.good]
    tokens, steps = _sum(good, "completion_tokens"), _sum(good, "num_steps")
    rounds = _sum(good, "num_blocks") - _sum(good, "num_ar_blocks") - _sum(good, "num_diffusion_blocks")
    drafted = _sum(good, "num_drafted")
    return Figures(
        passes[0].mode or default_mode,
        passes[0].load.name,
        len(passes),
        len(samples),
        dict(sorted(Counter(sample.error for sample in samples if sample.error is not None).items())),
        Spread.of([one.tokens_per_s for one in passes]),
        Spread.of([one.requests_per_s for one in passes]),
        Distribution.of(sample.first_s for sample in good if sample.blocks_s),
        Distribution.of(gap for sample in good for gap in sample.gaps_s),
        Distribution.of(sample.latency_s for sample in good),
        Distribution.of(sample.late_s for sample in samples),
        tokens / len(good) if good else math.nan,
        tokens / steps if steps else None,
        _sum(good, "num_accepted") / rounds if drafted and rounds else None,
        max(one.most_in_flight for one in passes),
        sum(one.client_cpu_s for one in passes) / sum(one.seconds for one in passes),
    )


def _sum(samples: Sequence[Sample], name: str) -> int:
    return sum(getattr(sample.usage, name) for sample in samples)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
