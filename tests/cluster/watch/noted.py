"""An exporter that keeps what it is told."""

from collections import Counter
from collections.abc import Sequence

from cluster.watch.metric import Metric
from cluster.watch.tally import Labels, Tally


class Noted:
    """`added` sums counters; `observed` and `gauges` as they came."""

    def __init__(self, tally: Tally | None = None) -> None:
        self.added: dict[tuple[Metric, Labels], float] = Counter()  # type: ignore[assignment]
        self.observed: dict[tuple[Metric, Labels], list[float]] = {}
        self.gauges: dict[tuple[Metric, Labels], float] = {}
        if tally is not None:
            tally.flush(self)

    def add(self, metric: Metric, labels: Labels, amount: float) -> None:
        assert amount >= 0, metric.name
        self.added[metric, labels] += amount

    def observe(self, metric: Metric, labels: Labels, values: Sequence[float]) -> None:
        self.observed.setdefault((metric, labels), []).extend(values)

    def set(self, metric: Metric, labels: Labels, value: float) -> None:
        self.gauges[metric, labels] = value

    def of(self, metric: Metric) -> dict[Labels, float]:
        """A counter's series that are not 0."""
        return {labels: amount for (one, labels), amount in self.added.items() if one is metric and amount}
