"""What an operator must act on is said, since when, and nothing where all is well."""

import asyncio
from dataclasses import replace

import pytest

from cluster.board.alerts import Level, alerts
from cluster.board.whole import cells_of, gone_of
from cluster.runs import kept
from cluster.runs.allowances import LimitReached
from cluster.runs.callers import KeyRefused
from tests.cluster.board.signed import DEPLOYED, MODES, Hearing, beat, tower
from twotower.core import Mode
from twotower.errors import Overloaded


def told(*hearing: Hearing) -> list[tuple[Level, str, float | None]]:
    parts = [one.part() for one in hearing]
    found = alerts(parts, cells_of(parts), gone_of(parts))
    return [(alert.level, alert.text, alert.since_s) for alert in found]


def test_all_is_well() -> None:
    hearing = Hearing(heard=[beat("a"), beat("b")])
    hearing.tick(10)
    assert told(hearing) == []


def test_a_cell_without_a_denoiser_and_since_when() -> None:
    hearing = Hearing(heard=[beat("a"), beat("b")])
    hearing.tick(5)
    hearing.heard[0] = beat("a", (Mode.AR,), 0.5)
    hearing.tick(13)
    assert told(hearing) == [(Level.ACT, "no denoiser in cell a", 12.0)]
    hearing.heard[1] = beat("b", ())
    hearing.tick(3)
    lost = ", ".join(mode for mode in Mode if mode is not Mode.AR)
    assert told(hearing)[:2] == [
        (Level.ACT, f"no cell serves {lost}", 2.0),
        (Level.ACT, "no denoiser in cell a", 15.0),
    ]
    hearing.heard = [beat("a"), beat("b")]
    hearing.tick()
    assert told(hearing) == []
    assert [event.text for event in hearing.board.history.events[-2:]] == [
        "cell a has lost a tower and mends itself",
        "cell a is whole again",
    ]


def test_no_cell_lives() -> None:
    hearing = Hearing(heard=[beat("a")])
    hearing.tick(5)
    hearing.heard = []
    hearing.tick(9)
    assert told(hearing) == [(Level.ACT, "no cell lives", 8.0), (Level.WATCH, "cell a was lost", 8.0)]
    hearing.tick(1000)
    assert told(hearing) == [(Level.ACT, "no cell lives", 1008.0)]


def test_a_service_that_starts_is_not_to_be_acted_on() -> None:
    hearing = Hearing()
    hearing.tick(2)
    assert told(hearing) == []
    hearing.tick(2)
    assert told(hearing) == [(Level.WATCH, "no cell has started yet", 4.0)]
    hearing.tick(120)
    assert told(hearing) == [(Level.ACT, "no cell has started yet", 124.0)]


def test_a_cell_that_leaves_is_none_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    hearing = Hearing(heard=[beat("a"), beat("b")])
    monkeypatch.setattr(kept, "cells", frozenset({"a"}))
    hearing.tick(5)
    assert [cell.leaves for cell in hearing.part().cells] == [False, True]
    hearing.heard = [beat("a")]
    hearing.tick(2)
    assert told(hearing) == [] and hearing.board.history.events[-1].text == "cell b has left"


def test_fewer_cells_than_there_shall_be() -> None:
    hearing = Hearing(deployed=replace(DEPLOYED, min_cells=2), heard=[beat("a"), beat("b")])
    hearing.tick(5)
    hearing.heard = [beat("a")]
    hearing.tick(4)
    assert told(hearing) == [(Level.WATCH, "1 of 2 cells live", 3.0), (Level.WATCH, "cell b was lost", 3.0)]


def test_mending_that_costs_no_mode_and_a_tower_that_says_nothing() -> None:
    silent = (tower("context"), tower("denoiser 0"), tower("denoiser 1", answers=False))
    hearing = Hearing(heard=[beat("a", MODES, 4.0), beat("b", MODES, 0.0, *silent)])
    hearing.tick(7)
    assert told(hearing) == [
        (Level.WATCH, "cell a mends itself", 4.0),
        (Level.WATCH, "the denoiser 1 tower of cell b does not answer", None),
    ]


async def test_requests_that_wait_long() -> None:
    hearing = Hearing(heard=[beat("a")])
    waiting = [asyncio.create_task(hearing.turns.take()) for _ in range(10)]
    await asyncio.sleep(0)
    hearing.tick(7)
    assert told(hearing) == [(Level.WATCH, "2 requests waiting for a turn", 7.0)]
    for task in waiting:
        task.cancel()


def test_failures_and_refusals_of_the_last_minute_in_all_routers() -> None:
    hearings = [Hearing(name, replace(DEPLOYED, routers=2), heard=[beat("a")]) for name in ("r1", "r2")]
    for hearing in hearings:
        hearing.tick(5)
        hearing.board._note("failed", "request failed with UNAVAILABLE")
        hearing.board.observer.refused(Overloaded("full"))
    assert told(*hearings) == [
        (Level.ACT, "2 requests failed in the last minute", None),
        (Level.WATCH, "2 calls refused in the last minute for want of room", None),
    ]
    for hearing in hearings:
        hearing.tick(61)
    assert told(*hearings) == []


def test_routers() -> None:
    two = replace(DEPLOYED, routers=2)
    hearing, other = Hearing("r1", two, heard=[beat("a")]), Hearing("r2", replace(two, settings="0"), heard=[beat("a")])
    for one in (hearing, other):
        one.tick(5)
    assert told(hearing) == [(Level.WATCH, "1 of 2 routers answer", None)]
    other.admission.close()
    assert told(hearing, other) == [
        (Level.WATCH, "routers of two deployments run", None),
        (Level.WATCH, "router r2 is to end", None),
    ]


def test_a_cell_that_one_router_hears_lives() -> None:
    hearing, other = Hearing("r1"), Hearing("r2", heard=[beat("a")])
    hearing.heard = [beat("a")]
    hearing.tick(4)
    hearing.heard = []
    for one in (hearing, other):
        one.tick(4)
    parts = [hearing.part(), other.part()]
    assert [cell.name for cell in cells_of(parts)] == ["a"] and gone_of(parts) == []


def test_calls_that_keys_have_stopped_are_told_by_reason() -> None:
    hearing = Hearing(heard=[beat("a"), beat("b")])
    hearing.tick(5)
    for _ in range(3):
        hearing.board.observer.refused(KeyRefused("this service requires a key", "no key"))
    hearing.board.observer.refused(LimitReached("me", "tokens_per_minute", "none left", 1.0))
    hearing.tick()
    reasons = "no key (3), key me is at its tokens_per_minute (1)"
    assert told(hearing) == [(Level.WATCH, f"4 calls refused in the last minute for their keys: {reasons}", None)]
    hearing.tick(61)
    assert told(hearing) == []


def test_a_changed_file_that_cannot_be_taken() -> None:
    hearing = Hearing(heard=[beat("a"), beat("b")])
    hearing.tick(5)
    part = hearing.part()
    parts = [replace(part, router=replace(part.router, faults=("ingress.keys_file: keys.yaml: is no YAML",)))]
    [alert] = alerts(parts, cells_of(parts), gone_of(parts))
    assert alert.level is Level.ACT
    assert alert.text == f"router {part.router.name} cannot take a file: ingress.keys_file: keys.yaml: is no YAML"
