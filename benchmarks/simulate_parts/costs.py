"""Seconds of a pass: the planner's, or measured ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Protocol

from benchmarks.simulate_parts.lengths import BLOCK
from twotower.planner.ceilings import Planner
from twotower.planner.passes import Batch, Kind, cost, kv_bytes, state_bytes

_GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class PassCosts(Protocol):
    """Of one cell. `carried`: what a committed block's states take on the link between two devices."""

    source: str

    def step(self, rows: int) -> float:
        """A denoiser pass over a block of each row."""
        ...

    def read(self, rows: int) -> float:
        """The context tower reads a block of each row."""
        ...

    def prompt(self, rows: int, width: int) -> float:
        """The context tower reads so many tokens of each of so many prompts."""
        ...

    def carried(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Line:
    """Straight between points (rows, seconds), constant before the first, in proportion behind the last."""

    points: tuple[tuple[float, float], ...]

    def at(self, rows: float) -> float:
        points = self.points
        if rows <= points[0][0]:
            return points[0][1]
        for (low, less), (high, more) in pairwise(points):
            if rows <= high:
                return less + (more - less) * (rows - low) / (high - low)
        last, seconds = points[-1]
        return seconds * rows / last


class PlannedCosts:
    """Of a planner's device, where each row has `context` tokens behind it. Floors: kernels alone."""

    def __init__(self, planner: Planner, context: int, read: Kind = Kind.COMMIT) -> None:
        self._planner, self._context = planner, context
        self._step, self._read = self._line(Kind.DENOISE), self._line(read)
        self.source = f"planner, {planner.device.name}, {context} tokens behind each row; derived, not measured"
        self.step, self.read = lru_cache(self._step.at), lru_cache(self._read.at)
        self.prompt = lru_cache(self._prompt)

    def _line(self, kind: Kind) -> Line:
        return Line(tuple((rows, self._planner.seconds(kind, rows, self._context)) for rows in _GRID))

    def _prompt(self, rows: int, width: int) -> float:
        planner = self._planner
        found = cost(Kind.PREFILL, planner.config, planner.context, Batch(rows, self._context, width), planner.touched)
        return found.seconds(planner.device, planner.assumed.reached)

    def carried(self) -> float:
        return self._carried

    @cached_property
    def _carried(self) -> float:
        planner = self._planner
        return (state_bytes(planner.config) + BLOCK * kv_bytes(planner.config)) / planner.device.link


class MeasuredCosts:
    """Of passes that were timed. `steps`, `reads`: seconds by rows; `token_s`: of a prompt's, and `prompt_s` a pass."""

    def __init__(
        self, steps: Mapping[int, float], reads: Mapping[int, float], prompt_s: float, token_s: float, source: str
    ) -> None:
        self._step, self._read = Line(tuple(sorted(steps.items()))), Line(tuple(sorted(reads.items())))
        self._prompt_s, self._token_s, self.source = prompt_s, token_s, source

    def step(self, rows: int) -> float:
        return self._step.at(rows)

    def read(self, rows: int) -> float:
        return self._read.at(rows)

    def prompt(self, rows: int, width: int) -> float:
        return self._prompt_s + self._token_s * rows * width

    def carried(self) -> float:
        return 0.0


def fixed(seconds: float, rows: Sequence[int] = (1,)) -> MeasuredCosts:
    """Every pass takes so long, whatever its rows, and prompts take nothing: for queues whose waits are known."""
    return MeasuredCosts({row: seconds for row in rows}, {row: 0.0 for row in rows}, 0.0, 0.0, f"{seconds:g} s a pass")
