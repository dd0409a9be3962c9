"""A cell's numbers: its towers' counters, whoever answers, and whatever is replaced."""

from dataclasses import replace

from cluster.watch import cell_metrics as metrics
from cluster.watch.cell import CellWatch, Moment
from cluster.watch.router_metrics import WAITING
from tests.cluster.watch.noted import Noted
from twotower.engine.handle import EngineStats

KEPT = {"prefix_lookups": 6, "prefix_hits": 5, "prefix_positions": 640, "prefix_evictions": 2, "prefix_bytes": 4096}
CONTEXT = EngineStats("context", 10, 40, 2.5, 1, 3, 60, 4, 64, 1, free_memory=1 << 30, process=100, **KEPT)
DENOISER = EngineStats("denoiser", 20, 60, 4.0, 1, 2, 48, 4, 64, 2, 0.5, 0.25, 4096, 3, 0.125, process=101)


class Watching:
    def __init__(self) -> None:
        self.noted, self.now = Noted(), 0.0
        self.watch = CellWatch("c1", "demo", self.noted, lambda: self.now)
        self.flush()

    def flush(self) -> Noted:
        self.noted.gauges.clear()
        self.watch._tally.flush(self.noted)
        return self.noted


def test_what_towers_count_is_counted_once() -> None:
    watching = Watching()
    for towers in ([CONTEXT, DENOISER], [CONTEXT, DENOISER], [replace(CONTEXT, ticks=15), DENOISER]):
        watching.watch.hears(towers, [100, 101])
    noted = watching.flush()
    assert noted.of(metrics.TICKS) == {("c1", "context"): 15, ("c1", "denoiser"): 20}
    assert noted.of(metrics.BUSY) == {("c1", "context"): 2.5, ("c1", "denoiser"): 4.0}
    assert noted.of(metrics.NEAR_TIES) == {("c1", "context"): 1, ("c1", "denoiser"): 2}
    assert noted.of(metrics.EXCHANGED) == {("c1", "denoiser"): 4096}
    assert noted.of(metrics.EXCHANGE_TIME) == {("c1", "denoiser"): 0.125}
    assert noted.of(metrics.EXPOSED) == {("c1", "denoiser", "commit"): 0.5, ("c1", "denoiser", "prompt"): 0.25}


def test_what_is_kept_of_prompts_is_the_context_towers() -> None:
    watching = Watching()
    for towers in ([CONTEXT, DENOISER], [replace(CONTEXT, prefix_hits=7), DENOISER]):
        watching.watch.hears(towers, [100, 101])
    noted, place = watching.flush(), ("c1", "context")
    counted = [metrics.PREFIX_LOOKUPS, metrics.PREFIX_HITS, metrics.PREFIX_TOKENS, metrics.PREFIX_EVICTIONS]
    assert [noted.of(metric) for metric in counted] == [{place: 6}, {place: 7}, {place: 640}, {place: 2}]
    assert noted.gauges[metrics.PREFIX_BYTES, place] == 4096
    assert (metrics.PREFIX_BYTES, ("c1", "denoiser")) not in noted.gauges


def test_how_full_towers_are() -> None:
    watching = Watching()
    watching.watch.hears([CONTEXT, DENOISER], [100, 101])
    gauges = watching.flush().gauges
    assert gauges[metrics.CACHE_USED, ("c1", "denoiser")] == 0.25 and gauges[metrics.PAGES, ("c1", "context")] == 64
    assert gauges[metrics.SLOTS_USED, ("c1", "denoiser")] == 2 and gauges[metrics.SLOTS, ("c1", "denoiser")] == 4
    assert gauges[metrics.FREE_MEMORY, ("c1", "context")] == 1 << 30
    assert (metrics.FREE_MEMORY, ("c1", "denoiser")) not in gauges, "its system does not say"


def test_a_tower_that_does_not_answer_has_no_gauges_and_loses_no_counts() -> None:
    watching = Watching()
    watching.watch.hears([CONTEXT, DENOISER], [100, 101])
    watching.watch.hears([CONTEXT], [100, 101])
    noted = watching.flush()
    assert (metrics.SLOTS, ("c1", "denoiser")) not in noted.gauges
    watching.watch.hears([CONTEXT, replace(DENOISER, ticks=21)], [100, 101])
    assert watching.flush().of(metrics.TICKS)["c1", "denoiser"] == 21


def test_when_no_tower_is_heard_of_what_they_said_counts_no_more() -> None:
    """One that hangs holds up all that are asked."""
    watching = Watching()
    watching.watch.hears([CONTEXT, DENOISER], [100, 101])
    for now, gauges in ((5.0, True), (5.1, False)):
        watching.now = now
        watching.watch.read(Moment(1, 0, 0.0, 0))
        assert ((metrics.SLOTS, ("c1", "context")) in watching.flush().gauges) == gauges


def test_a_replaced_tower_counts_from_nothing() -> None:
    watching = Watching()
    watching.watch.hears([CONTEXT, DENOISER], [100, 101])
    watching.watch.hears([CONTEXT, replace(DENOISER, ticks=30, process=102)], [100, 102])
    assert watching.flush().of(metrics.TICKS)["c1", "denoiser"] == 50


def test_several_denoisers_keep_their_names_when_one_is_lost() -> None:
    watching = Watching()
    second = replace(DENOISER, ticks=7, process=102)
    watching.watch.hears([CONTEXT, DENOISER, second], [100, 101, 102])
    watching.watch.hears([CONTEXT, replace(second, ticks=9)], [100, 101, 102])
    noted = watching.flush()
    assert noted.of(metrics.TICKS) == {("c1", "context"): 10, ("c1", "denoiser 0"): 20, ("c1", "denoiser 1"): 9}
    assert [labels for metric, labels in noted.gauges if metric is metrics.SLOTS] == [
        ("c1", "context"),
        ("c1", "denoiser 1"),
    ]


def test_both_towers_of_one_process() -> None:
    watching = Watching()
    watching.watch.hears([CONTEXT, replace(DENOISER, process=100)], [100])
    assert watching.flush().of(metrics.TICKS) == {("c1", "context"): 10, ("c1", "denoiser"): 20}


def test_the_cell_itself() -> None:
    watching = Watching()
    assert watching.noted.added == {(metrics.MENDED, ("c1",)): 0}, "a rate sees the first mend"
    for mended in (0, 1, 1):
        watching.watch.read(Moment(3, 2, 4.5, mended))
    noted = watching.flush()
    assert noted.of(metrics.MENDED) == {("c1",): 1}
    assert noted.gauges == {
        (metrics.RUNNING, ("c1",)): 3,
        (WAITING, ("c1",)): 2,
        (metrics.MENDING, ("c1",)): 4.5,
    }
