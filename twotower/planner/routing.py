"""How many experts of a layer a pass touches: uniform routing as the bound, or routing as it was measured on the demo.

Measured (`python -m benchmarks.routing`): how many different experts so many positions of one row touch. Rows of
different sequences count as independent, which the measured passes of several rows bear out (`tests/planner`).

Derived: another model's routing is taken to be alike at equal tokens x experts a token ÷ experts. A small model's
routing need not be a large one's.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from twotower.config import ModelConfig
from twotower.errors import ConfigError
from twotower.planner.devices import ROUTINGS
from twotower.planner.passes import Kind, Touched, uniform

_FILE = Path(__file__).with_name("routing_demo.json")


class Point(NamedTuple):
    """`touched`: different experts of a layer, on average, for `rows` rows with so many positions each; `off`: the
    standard error."""

    rows: int
    positions: int
    touched: float
    off: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """Measured on one checkpoint, named by its fingerprint. A verifying pass reads drafts: they count as commits."""

    checkpoint: str
    date: str
    command: str
    experts: int
    chosen: int
    points: dict[Kind, tuple[Point, ...]]

    def alike(self, kind: Kind, positions: float) -> float:
        """How many tokens of uniform routing touch as many experts as this many positions of one row. Measured values,
        linear between them. Below one position and beyond the last measured value the number is in proportion.
        """
        kind = Kind.COMMIT if kind is Kind.VERIFY else kind
        line = [(p.positions, self._alike(p.touched)) for p in self.points[kind] if p.rows == 1]
        for (low, less), (high, more) in pairwise(line):
            if low <= positions <= high:
                return less + (more - less) * (positions - low) / (high - low)
        at, tokens = line[0] if positions < line[0][0] else line[-1]
        return tokens * positions / at

    def _alike(self, touched: float) -> float:
        return math.log(1 - touched / self.experts) / math.log(1 - self.chosen / self.experts)


@cache
def of_the_demo() -> Statistics:
    """As `python -m benchmarks.routing` wrote them."""
    told = json.loads(_FILE.read_text(encoding="utf-8"))
    points = {Kind(name): tuple(Point(*point) for point in of) for name, of in told["points"].items()}
    about = told["checkpoint"], told["date"], told["command"], told["n_routed_experts"], told["num_experts_per_tok"]
    return Statistics(*about, points)


def touched_by(routing: str, config: ModelConfig) -> Touched:
    """One of ROUTINGS. Raises ConfigError."""
    even = uniform(config)
    if routing == "uniform":
        return lambda _kind, batch: even(batch.positions)
    if routing != "demo":
        raise ConfigError(f"routing: got {routing!r}, wanted one of {', '.join(ROUTINGS)}")
    return carried_over(of_the_demo(), config)


def carried_over(measured: Statistics, config: ModelConfig) -> Touched:
    """A row of another model is measured's row of equal tokens x experts a token ÷ experts."""
    if not config.n_routed_experts:
        return lambda kind, batch: 0.0
    even = uniform(config)
    scale = config.num_experts_per_tok / config.n_routed_experts * measured.experts / measured.chosen
    return lambda kind, batch: even(batch.rows * measured.alike(kind, batch.width * scale) / scale)
