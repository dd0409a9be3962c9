"""From slices of load to what watching costs: medians and ratios to the slice of the same round that nobody watched."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

AIM = 0.02  # of the throughput at most


class Way(StrEnum):
    """What is told of requests: nothing; metrics, log line and ops page, as by default; traces beside them."""

    OFF = "nothing"
    DEFAULT = "default"
    TRACES = "with traces"


@dataclass(frozen=True, slots=True)
class Slice:
    """So many requests from all clients. Seconds; `router_s`, `service_s`: CPU time of the router's process, and of all
    processes of the service and its Ray."""

    requests: int
    tokens: int
    seconds: float
    latencies_s: tuple[float, ...]
    router_s: float
    service_s: float


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of a slice; `scale` for showing."""

    name: str
    of: Callable[[Slice], float]
    digits: int


MEASURES = (
    Measure("tokens/s", lambda one: one.tokens / one.seconds, 0),
    Measure("latency, median, ms", lambda one: 1e3 * statistics.median(one.latencies_s), 0),
    Measure("latency, 95 %, ms", lambda one: 1e3 * statistics.quantiles(one.latencies_s, n=20)[-1], 0),
    Measure("router's CPU, ms a request", lambda one: 1e3 * one.router_s / one.requests, 2),
    Measure("service's CPU, ms a request", lambda one: 1e3 * one.service_s / one.requests, 2),
)


@dataclass
class Found:
    """By mode and way a slice a round, in the order of the rounds."""

    slices: dict[tuple[str, Way], list[Slice]] = field(default_factory=dict)

    def add(self, mode: str, way: Way, one: Slice) -> None:
        self.slices.setdefault((mode, way), []).append(one)

    @property
    def modes(self) -> list[str]:
        return list(dict.fromkeys(mode for mode, _ in self.slices))

    def values(self, mode: str, way: Way, measure: Measure) -> list[float]:
        return [measure.of(one) for one in self.slices[mode, way]]

    def ratios(self, mode: str, way: Way, measure: Measure) -> list[float]:
        """To the unwatched slice of the same round: what the machine does meanwhile hits both alike, mostly."""
        pairs = zip(self.values(mode, way, measure), self.values(mode, Way.OFF, measure), strict=True)
        return [ours / theirs for ours, theirs in pairs]


def lost(ratios: Sequence[float]) -> float:
    """The share of throughput that is gone, by the median round; below 0 where none is."""
    return 1 - statistics.median(ratios)


def surely(ratios: Sequence[float]) -> tuple[float, float]:
    """Between which ratios the median of all rounds there could be lies, about 19 times of 20: the binomial interval of
    the order statistics. Of fewer than six rounds all there are."""
    ordered, count = sorted(ratios), len(ratios)
    place = 0 if count < 6 else max(0, round(count / 2 - 0.98 * count**0.5) - 1)
    return ordered[place], ordered[-1 - place]
