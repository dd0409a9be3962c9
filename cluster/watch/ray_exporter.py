"""Sends numbers to Ray's exporter: this node's agent, which is one Prometheus target a node."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from ray.util import metrics

from cluster.watch.metric import Metric
from cluster.watch.tally import Labels

RayMetric = TypeVar("RayMetric", bound=metrics.Metric)


class RayExporter:
    """`common`: labels of all metrics of this process. Ray adds the worker and the node."""

    def __init__(self, common: Mapping[str, str]) -> None:
        self._common = {label: _ascii(value) for label, value in common.items()}
        self._counters: dict[Metric, metrics.Counter] = {}
        self._gauges: dict[Metric, metrics.Gauge] = {}
        self._histograms: dict[Metric, metrics.Histogram] = {}
        self._tags: dict[tuple[Metric, Labels], dict[str, str]] = {}

    def add(self, metric: Metric, labels: Labels, amount: float) -> None:
        counter = self._counters.get(metric)
        if counter is None:
            counter = metrics.Counter(metric.full_name, metric.meaning, self._tag_keys(metric))
            self._counters[metric] = counter
        # `inc` takes no 0, with which a series begins. Not public in Ray 2.60, which is pinned.
        counter._record(amount, self._tagged(metric, labels))

    def observe(self, metric: Metric, labels: Labels, values: Sequence[float]) -> None:
        histogram = self._histograms.get(metric)
        if histogram is None:
            bounds, keys = [*metric.bounds], self._tag_keys(metric)
            histogram = metrics.Histogram(metric.full_name, metric.meaning, bounds, keys)
            self._histograms[metric] = histogram
        tags = self._tagged(metric, labels)
        for value in values:
            histogram.observe(value, tags)

    def set(self, metric: Metric, labels: Labels, value: float) -> None:
        gauge = self._gauges.get(metric)
        if gauge is None:
            gauge = self._gauges[metric] = metrics.Gauge(metric.full_name, metric.meaning, self._tag_keys(metric))
        gauge.set(value, self._tagged(metric, labels))

    def _tag_keys(self, metric: Metric) -> tuple[str, ...]:
        return (*self._common, *metric.labels)

    def _tagged(self, metric: Metric, labels: Labels) -> dict[str, str]:
        key = metric, labels
        if key not in self._tags:
            own = dict(zip(metric.labels, map(_ascii, labels), strict=True))
            self._tags[key] = self._common | own
        return self._tags[key]


def _ascii(value: str) -> str:
    """Ray takes no other characters."""
    return value.encode("ascii", "backslashreplace").decode()
