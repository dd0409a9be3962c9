"""The series kept over time, each declared once: its unit, its meaning, and how routers' values are combined."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# Of times to a first token: each bound is half as much again, from 10 ms to ten minutes.
FIRST_TOKEN_BOUNDS = tuple(0.01 * 1.5**power for power in range(28))


@dataclass(frozen=True, slots=True)
class Series:
    """`across`: how routers' values are combined. Each router counts its own requests; all hear the same cells."""

    name: str
    unit: str
    meaning: str
    across: Callable[[Iterable[float]], float]


KEPT = (
    Series("tokens", "tokens/s", "tokens of answers, as clients get them", sum),
    Series("steps", "steps/s", "denoiser steps for blocks of diffusion's answers", sum),
    Series("step_tokens", "tokens/s", "tokens that these steps fixed", sum),
    Series("ended", "requests/s", "requests that ended without an error", sum),
    Series("failed", "requests/s", "requests that ended with an error, without those whose client left", sum),
    Series("refused", "calls/s", "calls that ended before a request of theirs began", sum),
    Series("resumed", "moves/s", "moves of running requests from a lost cell to another one", sum),
    Series("waiting", "requests", "requests that wait in a router for a turn on the cells", sum),
    Series("queued", "requests", "requests that wait in a cell for room", max),
    Series("longest_wait", "s", "how long the first waiting request in a router has waited", max),
    Series("running", "requests", "requests that have a place in a cell", max),
    Series("cells", "cells", "cells that live", max),
    Series("exchange", "bytes/s", "bytes of cache deltas that denoisers received", max),
    Series("exposed", "share", "share of denoisers' time in which they had sequences and stepped none", max),
    Series("busy_context", "share", "share of time in which context towers had work, mean over towers", max),
    Series("busy_denoiser", "share", "share of time in which denoiser towers had work, mean over towers", max),
)
PLACE = {series.name: place for place, series in enumerate(KEPT)}


@dataclass(frozen=True, slots=True)
class Point:
    """A second, or ten: from `t` on, in seconds since the epoch. `values`: one for each of KEPT. `firsts`: how many
    first tokens came within each of FIRST_TOKEN_BOUNDS, by the bound's place."""

    t: int
    values: tuple[float, ...]
    firsts: Mapping[int, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.values[PLACE[name]]


def over_time(t: int, points: Sequence[Point]) -> Point:
    """Points of one router combined into one that begins at `t`."""
    values = tuple(sum(column) / len(points) for column in zip(*(point.values for point in points), strict=True))
    return Point(t, values, _added(points))


def across_routers(t: int, points: Sequence[Point]) -> Point:
    """One moment of several routers."""
    columns = zip(*(point.values for point in points), strict=True)
    values = tuple(float(series.across(column)) for series, column in zip(KEPT, columns, strict=True))
    return Point(t, values, _added(points))


def _added(points: Sequence[Point]) -> dict[int, int]:
    sums: dict[int, int] = {}
    for point in points:
        for place, count in point.firsts.items():
            sums[place] = sums.get(place, 0) + count
    return sums


def first_token_place(seconds: float) -> int:
    """The place of the first bound that is not below `seconds`; the last place if all are."""
    last = len(FIRST_TOKEN_BOUNDS) - 1
    return next((place for place, bound in enumerate(FIRST_TOKEN_BOUNDS) if seconds <= bound), last)


def first_token_quantile(firsts: Mapping[int, int], quantile: float) -> float | None:
    """The quantile in seconds, interpolated within its bucket; None without first tokens."""
    total = sum(firsts.values())
    if not total:
        return None
    wanted, seen = quantile * total, 0
    for place in sorted(firsts):
        if seen + firsts[place] >= wanted:
            low = FIRST_TOKEN_BOUNDS[place - 1] if place else 0.0
            return low + (FIRST_TOKEN_BOUNDS[place] - low) * (wanted - seen) / firsts[place]
        seen += firsts[place]
    return FIRST_TOKEN_BOUNDS[max(firsts)]
