"""What a metric is. `router_metrics.py` and `cell_metrics.py` declare the metrics."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

PREFIX = "twotower_"
EXPORTED_AS = "ray_"  # what Ray's exporter writes before every name


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """One declaration: `name` without prefix, the unit of a value, and its meaning.

    `labels`: in addition to those that all metrics of a process have. `bounds`: of a histogram's buckets, each above 0.
    """

    name: str
    kind: Kind
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    @property
    def shown_name(self) -> str:
        """As Prometheus scrapes it."""
        return EXPORTED_AS + self.full_name

    def series(self, values: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
        """Every combination of these values of its labels."""
        return product(*(values[label] for label in self.labels))


def declared_in(module: Mapping[str, object]) -> tuple[Metric, ...]:
    """All metrics of a module, in order."""
    return tuple(value for value in module.values() if isinstance(value, Metric))
