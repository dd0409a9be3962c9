"""How many a router takes at a time, when it says that a refused one may come again, and how it closes."""

import asyncio
from contextlib import ExitStack

import pytest

from cluster.app import cell_deployment, router_deployment
from cluster.config import ServiceConfig
from cluster.faces.http.request_body import MAX_BODIES
from cluster.router import admission
from cluster.runs.admission import MOST_HINT_S, Admission
from twotower.errors import Cancelled, InvalidRequest, Overloaded, TwoTowerError, Unavailable


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refused(door: Admission, requests: int = 1) -> Overloaded:
    with pytest.raises(Overloaded) as caught, door.hold(requests):
        pass
    return caught.value


async def test_what_does_not_fit_is_refused_at_once_and_fits_again_later() -> None:
    door = Admission(capacity=3, slots=2)
    with door.hold(2), door.hold():
        assert str(refused(door)) == "3 requests are under way, wanted at most 3"
        assert door.running == 3
    assert door.running == 0
    with door.hold(3):
        assert refused(door).retry_after_s


def hints_of_a_full_queue(slots: int, waiting: int, each_s: float, refusals: int) -> tuple[list[float], float]:
    """Requests of `each_s` in a full service that is refilled for a while. Returns the hints of refusals, and the time
    that the cell needs to take up as many as were refused."""
    clock = Clock()
    door = Admission(slots + waiting, slots, clock)
    places = [ExitStack() for _ in range(slots + waiting)]
    for place in places:
        place.enter_context(door.hold())
    for turn in range(slots * 20):
        clock.now += each_s / slots
        place = places[turn % len(places)]
        place.close()
        place.enter_context(door.hold())
    hints = [refused(door).retry_after_s or 0.0 for _ in range(refusals)]
    for place in places:
        place.close()
    return hints, refusals * each_s / slots


async def test_a_hint_is_when_there_is_room_after_all_refused_before() -> None:
    hints, needed_s = hints_of_a_full_queue(slots=8, waiting=16, each_s=4.0, refusals=40)
    assert hints == sorted(hints)
    assert hints[0] == pytest.approx(1.0) and hints[-1] == pytest.approx(needed_s, rel=0.1)


async def test_a_hint_is_bounded() -> None:
    hints, _ = hints_of_a_full_queue(slots=2, waiting=2, each_s=100.0, refusals=40)
    assert hints[-1] == MOST_HINT_S
    hints, _ = hints_of_a_full_queue(slots=2, waiting=2, each_s=0.001, refusals=3)
    assert hints[0] == 1.0 and hints[-1] < 2.0


async def test_light_load_tells_how_long_requests_take() -> None:
    """One at a time, 3 s each: four that have begun together will end in 3 s, and then one comes every 0.75 s."""
    clock = Clock()
    door = Admission(4, 4, clock)
    for _ in range(200):
        with door.hold():
            clock.now += 3.0
    with door.hold(4):
        hints = [refused(door).retry_after_s for _ in range(4)]
    assert hints == pytest.approx([3.0, 3.75, 4.5, 5.25], rel=0.1)


async def test_what_takes_longer_than_thought_moves_the_hint_away() -> None:
    clock = Clock()
    door = Admission(4, 4, clock)
    hints = []
    with door.hold(4):
        for _ in range(3):  # as often as SDKs try
            hints.append(refused(door).retry_after_s or 0.0)
            clock.now += hints[-1]
    assert hints == pytest.approx([8.0, 8.0, 16.0], rel=0.3)


@pytest.mark.parametrize(
    "left",
    [InvalidRequest.of("seed", "wrong"), Overloaded("a cell is full", 1.0), Unavailable("gone"), Cancelled("left")],
)
async def test_what_does_not_run_to_its_end_is_no_measurement(left: TwoTowerError) -> None:
    clock = Clock()
    door, untouched = Admission(4, 4, clock), Admission(4, 4, clock)
    for _ in range(100):
        with pytest.raises(type(left)), door.hold():
            raise left
    with door.hold(4), untouched.hold(4):
        assert refused(door, 4).retry_after_s == refused(untouched, 4).retry_after_s


async def test_hints_of_a_storm_are_forgotten_once_there_is_room() -> None:
    clock = Clock()
    door = Admission(4, 4, clock)
    with door.hold(4):
        hints = [refused(door).retry_after_s for _ in range(1000)]
        assert hints[-1] == MOST_HINT_S
        clock.now += 20.0
    with door.hold(4):
        clock.now += 0.001
        assert (refused(door).retry_after_s or 0.0) < MOST_HINT_S / 2


async def test_a_cells_own_refusal_leaves_with_a_hint() -> None:
    with pytest.raises(Overloaded) as caught, Admission(2, 1).hold():
        raise Overloaded("the ledger is full")
    assert caught.value.retry_after_s and caught.value.retry_after_s >= 1.0


async def test_a_closed_one_takes_nothing_and_waits_for_the_last() -> None:
    door = Admission(4, 4)
    with ExitStack() as place:
        place.enter_context(door.hold())
        door.close()
        with pytest.raises(Unavailable, match="shutting down"), door.hold():
            pass
        assert not await door.nothing_runs(within_s=0.01)
        waiting = asyncio.create_task(door.nothing_runs(within_s=5))
        await asyncio.sleep(0)
    assert await waiting


CELL = {"max_sequences": 4, "placement": "colocated", "device": "cpu"}


def test_serve_leaves_it_to_the_router_to_refuse() -> None:
    config = ServiceConfig.parse({"cluster": {"max_cells": 3, "max_queued_requests": 10}, "cell": CELL})
    assert admission(config).capacity == 3 * (4 + 10)
    assert router_deployment(config).max_ongoing_requests > admission(config).capacity + MAX_BODIES


def test_no_queue_at_all_is_a_setting_that_serve_takes() -> None:
    config = ServiceConfig.parse({"cluster": {"max_queued_requests": 0}, "cell": CELL})
    assert cell_deployment(config).max_queued_requests == -1
    assert admission(config).capacity == 4
