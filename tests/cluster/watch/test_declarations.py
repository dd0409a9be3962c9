"""Declarations that Prometheus and Ray take, and names that say what they are."""

import re

import pytest

from cluster.watch import cell_metrics, router_metrics
from cluster.watch.metric import Kind, Metric, declared_in

ALL = (*declared_in(vars(router_metrics)), *declared_in(vars(cell_metrics)))


def test_names_are_unique() -> None:
    assert len({metric.name for metric in ALL}) == len(ALL) > 30


@pytest.mark.parametrize("metric", ALL, ids=[metric.name for metric in ALL])
def test_a_declaration(metric: Metric) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert ("seconds" in metric.name) == (metric.unit == "seconds") or metric.unit == "bytes"
    assert bool(metric.bounds) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.bounds) == sorted(set(metric.bounds)) and all(bound > 0 for bound in metric.bounds)
    assert metric.meaning.isascii(), "Ray takes nothing else"
    known = {"mode", "finished_reason", "code", "cell", "tower", "reason", "key", "limit", "chosen", "face", "file"}
    assert set(metric.labels) <= known
