"""What a metric is. Which there are is declared in `router_metrics.py` and `cell_metrics.py`."""

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
    """One declaration: `name` without prefix, what a value counts, and what it means.

    `labels` beside those that all metrics of a process have. `bounds`: of a histogram's buckets, each above 0.
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
