"""A router's gauges, and what is told of it before anything has happened."""

import asyncio
from typing import Any, cast

import pytest

from cluster.runs.admission import Admission
from cluster.runs.turns import Turns
from cluster.watch import router_metrics as metrics
from cluster.watch import tally
from cluster.watch.router import RouterWatch
from tests.cluster.watch.noted import Noted
from twotower.core import Mode


class Lines:
    def living(self, mode: Mode) -> set[str]:
        return {"a", "b"} if mode is Mode.AR else {"a"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "FLUSH_S", 0.001)


async def told(noted: Noted) -> None:
    while not noted.gauges:
        await asyncio.sleep(0.001)


async def test_gauges_and_counters_that_begin_at_nothing(quick: None) -> None:
    noted, admission, now = Noted(), Admission(8, 2), [0.0]
    turns = Turns(lambda: 1, clock=lambda: now[0])
    watch = RouterWatch("demo", (Mode.DIFFUSION, Mode.AR), noted)
    first, second = (asyncio.create_task(turns.take()) for _ in range(2))
    await first
    now[0] = 2.5
    with admission.hold(3):
        watch.start(admission, turns, cast(Any, Lines()), cast(Any, lambda: True))
        await told(noted)
    await watch.stop()
    second.cancel()
    assert noted.gauges == {
        (metrics.OPEN, ()): 3,
        (metrics.WAITING, ("router",)): 1,
        (metrics.LONGEST_WAIT, ()): 2.5,
        (metrics.READY, ()): 1,
        (metrics.CELLS, ("diffusion",)): 1,
        (metrics.CELLS, ("ar",)): 2,
    }
    assert noted.added[metrics.SUCCESS, ("diffusion", "length")] == 0
    assert noted.added[metrics.FAILURE, ("score", "UNAVAILABLE")] == 0
    assert noted.added[metrics.REFUSED, ("RESOURCE_EXHAUSTED",)] == 0 == noted.added[metrics.STEPS, ()]
    assert not any(noted.added.values()) and not any("mock_ar" in labels for _, labels in noted.added)


async def test_what_happened_last_is_flushed_at_the_end() -> None:
    noted = Noted()
    watch = RouterWatch("demo", (Mode.AR,), noted)
    watch.start(Admission(8, 2), Turns(), cast(Any, Lines()), cast(Any, lambda: True))
    watch.observers[1].refused(TimeoutError())  # type: ignore[arg-type]
    await watch.stop()
    assert noted.of(metrics.REFUSED) == {("INTERNAL",): 1}
