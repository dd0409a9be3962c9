"""What is counted goes out once, gauges each time; and what Ray is told."""

import asyncio

import pytest
from ray.util import metrics as of_ray

from cluster.watch import cell_metrics, router_metrics
from cluster.watch import tally as tally_module
from cluster.watch.metric import Kind, Metric, declared_in
from cluster.watch.ray_exporter import RayExporter
from cluster.watch.tally import Tally, flush_for_ever
from tests.cluster.watch.noted import Noted

SENT = Metric("sent_total", Kind.COUNTER, "things", "are sent", ("way",))
TOOK = Metric("took_seconds", Kind.HISTOGRAM, "seconds", "it took", ("way",), (0.1, 1.0))
DEPTH = Metric("depth", Kind.GAUGE, "things", "wait")


def test_counts_go_out_once_and_gauges_each_time() -> None:
    tally, noted = Tally(), Noted()
    tally.add(SENT, 2, "up")
    tally.add(SENT, 3, "up")
    tally.add(SENT, 0, "down")
    tally.observe(TOOK, 0.5, "up")
    tally.observe(TOOK, 0.25, "up")
    tally.set(DEPTH, 7)
    tally.flush(noted)
    assert noted.added == {(SENT, ("up",)): 5, (SENT, ("down",)): 0}
    assert noted.observed == {(TOOK, ("up",)): [0.5, 0.25]} and noted.gauges == {(DEPTH, ()): 7}
    again = Noted(tally)
    assert not again.added and not again.observed and again.gauges == {(DEPTH, ()): 7}
    tally.forget(DEPTH)
    assert not Noted(tally).gauges


def test_a_wrong_use_is_seen_at_once() -> None:
    tally = Tally()
    for wrong in (lambda: tally.add(SENT, 1), lambda: tally.add(DEPTH, 1), lambda: tally.set(TOOK, 1.0, "up")):
        with pytest.raises(AssertionError):
            wrong()


async def test_flushing_goes_on_after_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tally_module, "FLUSH_S", 0.001)
    tally, noted, reads = Tally(), Noted(), 0

    def read() -> None:
        nonlocal reads
        reads += 1
        tally.add(SENT, 1, "up")
        if reads == 1:
            raise RuntimeError("not now")

    flushing = asyncio.create_task(flush_for_ever(tally, noted, read))
    while noted.added.get((SENT, ("up",)), 0) < 3:
        await asyncio.sleep(0)
    flushing.cancel()
    assert noted.added[SENT, ("up",)] == reads and "metrics of a second are lost" in caplog.text


def test_what_ray_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float, dict[str, str]]] = []

    def record(self: of_ray.Metric, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self._tag_keys)
        told.append((self._name, value, tags))

    monkeypatch.setattr(of_ray.Metric, "_record", record)
    exporter, tally = RayExporter({"model_name": "größe"}), Tally()
    tally.add(SENT, 0, "up")
    tally.observe(TOOK, 0.5, "up")
    tally.observe(TOOK, 2.0, "up")
    tally.set(DEPTH, 0)
    tally.flush(exporter)
    name = "gr\\xf6\\xdfe"  # Ray takes ASCII only
    up = {"model_name": name, "way": "up"}
    assert told == [
        ("twotower_sent_total", 0, up),
        ("twotower_took_seconds", 0.5, up),
        ("twotower_took_seconds", 2.0, up),
        ("twotower_depth", 0, {"model_name": name}),
    ]


def test_ray_s_own_metrics_take_all_that_is_declared() -> None:
    """Names, meanings, labels and bounds; without a Ray that runs, the numbers go nowhere."""
    exporter = RayExporter({"model_name": "größe"})
    for metric in (*declared_in(vars(router_metrics)), *declared_in(vars(cell_metrics))):
        labels = ("ä",) * len(metric.labels)
        match metric.kind:
            case Kind.COUNTER:
                exporter.add(metric, labels, 0)
            case Kind.GAUGE:
                exporter.set(metric, labels, 1.0)
            case Kind.HISTOGRAM:
                exporter.observe(metric, labels, [0.5])
