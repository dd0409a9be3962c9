"""How many cells there should be: a table of situations, what a cell feels, and what Serve makes of both."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.app import cell_deployment
from cluster.config import ServiceConfig
from cluster.runs.cell_lines import CellLines
from cluster.runs.messages import Waits
from cluster.scaling import LONG_WAIT_S, Load, Meter, Policy, wanted
from tests.cluster.test_cell import RunningFake, ScriptedEngine, started
from twotower.engine.handle import EngineStats
from twotower.engine.ledger import Ledger, Room
from twotower.errors import Unavailable

FULL = 0.8


def load(running: float = 0, waiting: float = 0, pages: float = 0.0, busy: float = 1.0, **more: float) -> Load:
    return Load(10, running, waiting, pages, busy, **more)


IDLE = load(busy=0.0)
ROUTERS_WAIT = {"routers_waiting": 40.0, "longest_wait_s": 1.0}
LONG = {"routers_waiting": 1.0, "longest_wait_s": LONG_WAIT_S + 0.1}


@pytest.mark.parametrize(
    ("situation", "loads", "target", "queued", "cells"),
    [
        ("nobody says anything", [], 3, 50.0, 3),
        ("idle", [IDLE], 1, 0.0, 1),
        ("one stream keeps its towers busy", [load(1)], 1, 0.0, 1),
        ("eight of ten slots", [load(8)], 1, 0.0, 1),
        ("nine of ten slots", [load(9)], 1, 0.0, 2),
        ("nine taken by requests that no tower works on", [load(9, busy=0.1)], 1, 0.0, 1),
        ("the same, and one waits", [load(10, 1, busy=0.1)], 1, 0.0, 2),
        ("a burst in a cell's own queue", [load(10, 14)], 1, 0.0, 3),
        ("a burst in the routers", [load(10, **ROUTERS_WAIT)], 1, 0.0, 7),
        ("which every cell hears of", [load(10, **ROUTERS_WAIT), load(10, **ROUTERS_WAIT)], 2, 0.0, 8),
        ("a burst inside Serve", [load(10)], 1, 6.0, 2),
        ("before anything runs", [load(0, **ROUTERS_WAIT)], 1, 0.0, 5),
        ("the cells for it are on their way", [load(10, **ROUTERS_WAIT)], 7, 0.0, 7),
        ("few long requests fill the pages", [load(3, pages=0.9)], 1, 0.0, 2),
        ("and more of the kind wait", [load(3, 3, pages=0.9)], 1, 0.0, 3),
        ("two cells, one full", [load(10), load(0)], 2, 0.0, 2),
        ("one waits long though there is room", [load(2, **LONG)], 1, 0.0, 2),
        ("and its cell is on its way", [load(2, **LONG)], 2, 0.0, 2),
        ("however many are on their way", [load(2, **LONG)], 5, 0.0, 2),
        ("what is left fits one with a margin, and one goes at a time", [load(2), load(2), load(2)], 3, 0.0, 2),
        ("of many a quarter", [load(1)] * 20, 20, 0.0, 15),
        ("or what it takes", [load(5)] * 20, 20, 0.0, 17),
        ("all at once where nothing runs", [IDLE] * 20, 20, 0.0, 1),
        ("what is left fits fewer without one", [load(4), load(3)], 2, 0.0, 2),
        ("it fits two of three", [load(3), load(3), load(3)], 3, 0.0, 2),
        ("all gone", [IDLE, IDLE, IDLE], 3, 0.0, 1),
        ("a cell that has just come says nothing yet", [load(10, 10)], 3, 0.0, 3),
    ],
)
def test_situations(situation: str, loads: list[Load], target: int, queued: float, cells: int) -> None:
    assert wanted(loads, target, FULL, queued) == cells, situation


def test_no_load_makes_cells_come_and_go_by_turns() -> None:
    """What wants a cell more at n does not want one less at n + 1."""
    for cells in range(1, 6):
        for running in range(0, 10 * cells + 1):
            here = [load(running / cells) for _ in range(cells)]
            after = wanted(here, cells, FULL)
            if after > cells:
                assert wanted([load(running / after) for _ in range(after)], after, FULL) == after
            if after < cells:
                assert wanted([load(running / after) for _ in range(after)], after, FULL) <= after


def policy() -> Any:
    """As Serve's controller gets it: by value."""
    config = cell_deployment(ServiceConfig.parse({"cell": CELL, "cluster": {"max_cells": 5}}))
    scaling = config._deployment_config.autoscaling_config
    assert isinstance(scaling, AutoscalingConfig)
    made = scaling.policy.get_policy()(**scaling.policy.policy_kwargs)
    assert type(made).__name__ == Policy.__name__
    return made


CELL = {"max_sequences": 10, "placement": "colocated", "device": "cpu"}


def context(loads: dict[str, tuple[float, Load]], now: float, target: int = 1, state: Any = None) -> Any:
    """`loads`: what cells have said, and when by their own clocks."""
    series: dict[str, dict[str, list[Any]]] = {}
    for cell, (said_at, said) in loads.items():
        for name, value in asdict(said).items():
            old = SimpleNamespace(timestamp=said_at - 1.0, value=0.0)
            series.setdefault(name, {})[cell] = [old, SimpleNamespace(timestamp=said_at, value=value)]
    scaling = AutoscalingConfig(min_replicas=1, max_replicas=5, upscale_delay_s=2, downscale_delay_s=120)
    shared: dict[str, Any] = dict.fromkeys(
        ("deployment_id", "deployment_name", "app_name", "last_scale_up_time", "last_scale_down_time")
    )
    return AutoscalingContext(
        **shared,
        current_num_replicas=len(loads),
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics=None,
        raw_metrics=series,  # type: ignore[arg-type]
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=5,
        policy_state=state or {},
        current_time=now,
        config=scaling,
    )


def test_the_policy_goes_by_value_and_takes_the_last_word_of_each_cell() -> None:
    decide = policy()
    assert decide(context({"a": (7.0, load(10, 14))}, now=1000.0)) == (3, {}), "clocks of hosts may differ"
    assert decide(context({}, now=1001.0, target=3)) == (3, {})


def test_what_a_hung_cell_said_last_counts_for_a_few_seconds() -> None:
    decide = policy()
    loads = {"hung": (7.0, load(0, **LONG)), "well": (8.0, IDLE)}
    assert decide(context(loads, now=100.0, target=2))[0] == 3
    for now in range(101, 110):
        loads["well"] = (8.0 + now, IDLE)
        got = decide(context(loads, now=float(now), target=2))[0]
        assert got == (3 if now <= 105 else 1), now


def test_a_cell_whose_word_is_incomplete_is_as_good_as_silent() -> None:
    said = context({"a": (7.0, load(10, 14))}, now=100.0)
    del said.raw_metrics["pages"]
    assert policy()(said)[0] == 1


def test_serves_delays_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst of less than `upscale_delay_s` starts nothing; one that lasts does, in the second after."""
    decide, state, target = _apply_autoscaling_config(policy()), {}, 1
    counts = []
    for tenth in range(40):
        monkeypatch.setattr("ray.serve.autoscaling_policy.time.time", lambda now=100.0 + tenth / 10: now)
        said = {"a": (float(tenth), load(10, 14) if tenth >= 5 else IDLE)}
        target, state = decide(context(said, now=100.0 + tenth / 10, target=target, state=state))
        counts.append(target)
    assert counts.index(3) == 25, "2 s after the burst began"
    assert set(counts) == {1, 3}


def test_the_cells_deployment_tells_serve_each_second() -> None:
    cluster = {"min_cells": 1, "max_cells": 3, "target_fullness": 0.5, "downscale_delay_s": 7}
    deployed = cell_deployment(ServiceConfig.parse({"cell": CELL, "cluster": cluster}))
    scaling = deployed._deployment_config.autoscaling_config
    assert isinstance(scaling, AutoscalingConfig)
    assert (scaling.min_replicas, scaling.max_replicas, scaling.downscale_delay_s) == (1, 3, 7)
    assert scaling.upscale_delay_s == 2.0 and scaling.policy.policy_kwargs == {"fullness": 0.5}
    assert scaling.metrics_interval_s == 1.0 and math.isclose(scaling.look_back_period_s, 2.0)


class Towers:
    """Counters as two towers tell them."""

    def __init__(self) -> None:
        self.stats = [EngineStats("context", total_pages=10, free_pages=10), EngineStats("denoiser")]
        self.error: Exception | None = None

    async def __call__(self) -> Sequence[EngineStats]:
        if self.error is not None:
            raise self.error
        return self.stats

    def worked(self, context_s: float, denoiser_s: float, free_pages: int) -> None:
        self.stats = [
            EngineStats("context", busy_s=context_s, total_pages=10, free_pages=free_pages),
            EngineStats("denoiser", busy_s=denoiser_s, total_pages=20, free_pages=20),
        ]


async def test_a_cell_feels_slots_pages_and_its_busiest_tower() -> None:
    now, towers, ledger = [10.0], Towers(), Ledger(Room(4, 100), [], 8)
    meter = Meter(lambda: now[0])

    async def felt(*waits: Waits) -> Load:
        return Load(**await meter.read(ledger, towers, waits))

    assert await felt() == Load(4)
    now[0] += 2.0
    towers.worked(context_s=0.5, denoiser_s=1.5, free_pages=4)
    assert await felt(Waits(3, 0.5), Waits(4, 2.5)) == Load(4, 0, 0, 0.6, 0.75, 7, 2.5)
    towers.error = Unavailable("the denoiser process is gone")
    now[0] += 1.0
    assert (await felt()).busy == 0.75, "as it was"
    towers.error = None
    towers.worked(context_s=0.5, denoiser_s=0.1, free_pages=10)  # a new one, which counts from 0
    assert (await felt()).busy == 0.0


async def test_what_waits_in_a_router_reaches_what_a_cell_tells_serve() -> None:
    lines, cell = CellLines(), await started(RunningFake(ScriptedEngine(), slots=3))
    lines.waits = lambda: Waits(17, 4.5)
    await lines.start("127.0.0.1")
    try:
        assert await cell.served(lines.address)
        said = Load(**await cell.record_autoscaling_stats())
        async with asyncio.timeout(5):
            while not said.routers_waiting:
                await asyncio.sleep(0.02)
                said = Load(**await cell.record_autoscaling_stats())
        assert (said.slots, said.running, said.routers_waiting, said.longest_wait_s) == (3, 0, 17, 4.5)
    finally:
        await cell.shutdown()
        lines.stop()
