"""Counts in plain Python, so that an event costs one dictionary entry; once a second all counts go to the exporter.

Knows nothing of the exporter. One thread calls it: the event loop's.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.watch.metric import Kind, Metric

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
Labels = tuple[str, ...]  # values, in the order of the metric's labels
Series = tuple[Metric, Labels]


class Exporter(Protocol):
    """A destination of metrics. Counters get the amount added since the last call."""

    def add(self, metric: Metric, labels: Labels, amount: float) -> None: ...

    def observe(self, metric: Metric, labels: Labels, values: Sequence[float]) -> None: ...

    def set(self, metric: Metric, labels: Labels, value: float) -> None: ...


class Tally:
    """The counts since the last flush. Gauges are kept, because an exporter may drop a gauge that is not repeated."""

    def __init__(self) -> None:
        self._added: Counter[Series] = Counter()
        self._observed: dict[Series, list[float]] = {}
        self._gauges: dict[Series, float] = {}

    def add(self, metric: Metric, amount: float, *labels: str) -> None:
        """An amount of 0 begins the series; otherwise a rate would not see its first increase."""
        assert metric.kind is Kind.COUNTER and len(labels) == len(metric.labels), metric.name
        self._added[metric, labels] += amount  # type: ignore[assignment]  # a Counter of seconds, too

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        assert metric.kind is Kind.HISTOGRAM and len(labels) == len(metric.labels), metric.name
        self._observed.setdefault((metric, labels), []).append(value)

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        assert metric.kind is Kind.GAUGE and len(labels) == len(metric.labels), metric.name
        self._gauges[metric, labels] = value

    def forget(self, metric: Metric, *labels: str) -> None:
        """Drop a gauge whose value is not known now."""
        self._gauges.pop((metric, labels), None)

    def flush(self, exporter: Exporter) -> None:
        added, self._added = self._added, Counter()
        observed, self._observed = self._observed, {}
        for (metric, labels), amount in added.items():
            exporter.add(metric, labels, amount)
        for (metric, labels), values in observed.items():
            exporter.observe(metric, labels, values)
        for (metric, labels), value in self._gauges.items():
            exporter.set(metric, labels, value)


async def flush_for_ever(tally: Tally, exporter: Exporter, read: Callable[[], None]) -> None:
    """Once a second. `read` brings the tally up to date before each flush."""
    while True:
        await asyncio.sleep(FLUSH_S)
        try:
            read()
            tally.flush(exporter)
        except Exception:
            logger.exception("metrics of a second are lost")
