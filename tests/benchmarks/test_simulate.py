"""The model against queues whose waits are known, and against itself: nothing is lost, nothing leaks."""

import asyncio
import math
from random import Random
from statistics import mean

import pytest

from benchmarks.simulate_parts.cell import SimCell
from benchmarks.simulate_parts.clock import NothingLeft, simulated
from benchmarks.simulate_parts.costs import Line, MeasuredCosts, fixed
from benchmarks.simulate_parts.device import Processor
from benchmarks.simulate_parts.lengths import LENGTHS, Asked, blocks_of, draw, steps_of
from benchmarks.simulate_parts.router import RouterCosts
from benchmarks.simulate_parts.serve import Pace
from benchmarks.simulate_parts.simulation import Cluster, Happening, Result, Setting
from cluster.config import ServiceConfig

COSTS = MeasuredCosts({1: 0.01, 8: 0.02}, {1: 0.01, 8: 0.015}, 0.005, 0.00001, "made up")
AT_ONCE = Pace(hop_s=0.0)


def config(
    cells: int = 1, slots: int = 4, queued: int = 8, most: int | None = None, **cluster: object
) -> ServiceConfig:
    return ServiceConfig.parse(
        {
            "cell": {"placement": "colocated", "device": "cpu", "max_sequences": slots},
            "cluster": {"min_cells": cells, "max_cells": most or cells, "max_queued_requests": queued, **cluster},
        }
    )


def test_an_hour_passes_at_once_and_a_deadlock_is_told() -> None:
    async def sleeps() -> float:
        for _ in range(3):
            await asyncio.sleep(1200.0)
        return asyncio.get_running_loop().time()

    async def waits() -> None:
        await asyncio.get_running_loop().create_future()

    assert simulated(sleeps()) == 3600.0
    with pytest.raises(NothingLeft):
        simulated(waits())


def test_waits_for_one_server_are_those_of_m_m_1() -> None:
    """W = ρ / (μ - λ), at ρ = 0.7: 2.33 service times."""
    waits: list[float] = []

    async def queue(count: int, rate: float) -> None:
        loop, random, at = asyncio.get_running_loop(), Random(1), 0.0
        processor = Processor(loop)

        async def one(seconds: float) -> None:
            came = loop.time()
            await processor.use(seconds)
            waits.append(loop.time() - came - seconds)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(count):
                at += random.expovariate(rate)
                await asyncio.sleep(at - loop.time())
                tasks.create_task(one(random.expovariate(1.0)))

    simulated(queue(5000, 0.7))
    assert mean(waits[500:]) == pytest.approx(0.7 / (1 - 0.7), rel=0.15)


def m_d_c_wait(servers: int, load: float) -> float:
    """In service times: Crommelin's formula as Tijms has it. `load`: arrivals in a service time."""
    total = 0.0
    for turn in range(1, 400):
        mean_ = turn * load
        most = turn * servers

        def term(count: int, mean_: float = mean_) -> float:
            return math.exp(count * math.log(mean_) - mean_ - math.lgamma(count + 1))

        tail = sum(term(count) for count in range(most, most + 400))
        more = sum(term(count) for count in range(most + 1, most + 401))
        total += tail - servers / load * more
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("cells", "load"), [(1, 0.7), (3, 2.4)])
def test_a_router_before_cells_of_one_slot_is_m_d_c(cells: int, load: float) -> None:
    """Nothing waits in a cell: all of the queue is the product's turns. A request is one pass of a second."""
    wanted = m_d_c_wait(cells, load)
    if cells == 1:
        assert wanted == pytest.approx(0.7 / (2 * (1 - 0.7)), rel=1e-6), "Pollaczek and Khinchine"
    made = Setting(config(cells, slots=1, queued=0), fixed(1.0), cells=cells, pace=AT_ONCE)

    async def run() -> Result:
        cluster = Cluster(made, seed=3)
        for router in cluster.routers:
            router.admission._capacity = 10_000  # of an endless queue
        return await cluster.open_loop([(0.0, load)], 6000.0 / cells, lambda random: Asked(1, 16, (1,)))

    result = simulated(run())
    assert not any(one.error for one in result.outcomes)
    assert mean(one.latency_s - 1.0 for one in result.outcomes[100:]) == pytest.approx(wanted, rel=0.2)


def small(
    seed: int,
    happenings: tuple[Happening, ...] = (),
    scales: bool = False,
    denoisers: int = 0,
    answers: list[int] | None = None,
) -> Result:
    """`answers`: where the tokens of what is asked are noted."""
    made = Setting(
        config(3, slots=2, most=6, num_routers=2, downscale_delay_s=3.0, upscale_delay_s=1.0),
        COSTS,
        cells=3,
        routers=2,
        router_costs=RouterCosts(0.002, 0.0002),
        pace=Pace(start_s=2.0),
        scales=scales,
        denoisers=denoisers,
    )

    def drawn(random: Random) -> Asked:
        answer = random.randrange(1, 200)
        if answers is not None:
            answers.append(answer)
        return Asked(random.randrange(1, 900), answer, steps_of(blocks_of(answer), 5.6, random))

    async def run() -> Result:
        cluster = Cluster(made, seed)
        return await cluster.open_loop([(0.0, 4.0), (4.0, 12.0), (8.0, 2.0)], 12.0, drawn, happenings)

    return simulated(run())


def test_nothing_is_lost_and_nothing_leaks_while_cells_come_go_and_die() -> None:
    happenings = (
        Happening(3.0, "a cell dies", lambda cluster: cluster.controller.kill(_first(cluster), silent=False)),
        Happening(6.0, "a cell falls silent", lambda cluster: cluster.controller.kill(_first(cluster), silent=True)),
        Happening(7.0, "new settings", lambda cluster: cluster.controller.replace_all(2)),
    )
    result = small(1, happenings, scales=True)
    assert set(result.left.values()) == {0}, result.left
    assert len(result.outcomes) > 40
    assert not [one.error for one in result.outcomes if one.error], "what a cell held goes on elsewhere"
    assert sum(one.resumes for one in result.outcomes) > 0
    assert max(moment.cells for moment in result.moments) > 3, "it has scaled"


def _first(cluster: Cluster) -> SimCell:
    return max(cluster.controller.cells.values(), key=lambda cell: cell.held)


@pytest.mark.parametrize("denoisers", [0, 2])
def test_the_same_seed_gives_the_same_and_every_token_comes_once(denoisers: int) -> None:
    answers = list[int]()
    first, again = (small(7, denoisers=denoisers, answers=told) for told in (answers, None))
    assert first.outcomes == again.outcomes and first.moments == again.moments
    assert sum(one.tokens for one in first.outcomes) == sum(answers)
    assert not any(first.left.values())


def test_a_closed_loop_at_one_client_takes_the_sum_of_its_passes() -> None:
    """Prompt, then steps and reads in turn; the last block is not read."""
    made = Setting(config(), COSTS, pace=AT_ONCE)
    asked = [Asked(100, 40, (3, 2, 4))] * 5

    async def run() -> Result:
        return await Cluster(made, 1).closed_loop(1, asked)

    result = simulated(run())
    passes = (0.005 + 100 * 0.00001) + 9 * 0.01 + 2 * 0.01
    assert [one.latency_s for one in result.outcomes] == pytest.approx([passes] * 5)
    assert {one.tokens for one in result.outcomes} == {40}


def test_lengths_are_drawn_as_told() -> None:
    random, lengths = Random(1), LENGTHS["conversation"]
    drawn = [draw(lengths, 2.85, 7000, 1000, random) for _ in range(2000)]
    assert mean(one.prompt for one in drawn) == pytest.approx(1155, rel=0.1)
    assert mean(one.answer for one in drawn) == pytest.approx(211, rel=0.1)
    steps = [number for one in drawn for number in one.steps]
    assert mean(steps) == pytest.approx(16 / 2.85, rel=0.02) and min(steps) >= 1 and max(steps) <= 16
    assert max(one.prompt for one in drawn) <= 7000


def test_a_line_is_straight_between_points_and_grows_behind_them() -> None:
    line = Line(((1, 1.0), (3, 2.0)))
    assert [line.at(rows) for rows in (0.5, 1, 2, 3, 6)] == [1.0, 1.0, 1.5, 2.0, 4.0]
