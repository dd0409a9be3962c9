"""What a cell says of its towers: shares of the last second, and which of them do not answer."""

from dataclasses import replace

import pytest

from cluster.watch.tower_signs import TowerSigns, towers_of
from twotower.engine.handle import EngineStats

CONTEXT = EngineStats("context", busy_s=10.0, total_slots=4, free_slots=3, total_pages=64, free_pages=60, process=100)
DENOISER = EngineStats("denoiser", busy_s=20.0, held_up_s=1.0, prompt_wait_s=2.0, exchange_bytes=1000, process=101)
HOMES = [{"pid": "100", "device": "cuda:0", "memory": "1 GiB"}, {"pid": "101", "device": "cuda:1"}]


class Told:
    def __init__(self, placement: str = "split", denoisers: int = 1) -> None:
        self.now = 50.0
        self.signs = TowerSigns(towers_of(placement, denoisers), lambda: self.now)


def test_shares_are_of_the_time_between_two_answers() -> None:
    told = Told()
    told.signs.hears([CONTEXT, DENOISER], HOMES)
    assert [(sign.busy, sign.commit_wait) for sign in told.signs.now(HOMES)] == [(0.0, 0.0), (0.0, 0.0)]
    told.now += 2.0
    later = replace(DENOISER, busy_s=20.5, held_up_s=1.25, prompt_wait_s=3.0, exchange_bytes=5000)
    told.signs.hears([replace(CONTEXT, busy_s=13.0), later], HOMES)
    context, denoiser = told.signs.now(HOMES)
    assert (context.busy, context.free_slots, context.memory, context.device) == (1.0, 3, "1 GiB", "cuda:0")
    assert (denoiser.busy, denoiser.commit_wait, denoiser.prompt_wait) == (0.25, 0.125, 0.5)
    assert denoiser.exchange_rate == 2000.0 and denoiser.answers


def test_answers_right_after_one_another_are_one() -> None:
    told = Told()
    told.signs.hears([CONTEXT], HOMES)
    told.now += 1.0
    told.signs.hears([replace(CONTEXT, busy_s=10.5)], HOMES)
    told.now += 0.01
    told.signs.hears([replace(CONTEXT, busy_s=10.51)], HOMES)
    assert told.signs.now(HOMES)[0].busy == 0.5


def test_a_silent_tower_says_so_and_one_in_its_place_begins_anew() -> None:
    told = Told()
    told.signs.hears([CONTEXT, DENOISER], HOMES)
    told.now += 4.0
    told.signs.hears([CONTEXT], HOMES)
    told.now += 1.5
    context, denoiser = told.signs.now(HOMES)
    assert (context.answers, denoiser.answers, denoiser.name, denoiser.process) == (True, False, "denoiser", 101)
    homes = [HOMES[0], {"pid": "102", "device": "cuda:1"}]
    told.signs.hears([replace(DENOISER, busy_s=0.5, process=102)], homes)
    assert told.signs.now(homes)[1].busy == 0.0 and told.signs.now(homes)[1].answers
    assert not told.signs.now([HOMES[0], {}])[1].answers, "it is being replaced"


@pytest.mark.parametrize(
    ("placement", "denoisers", "names"),
    [
        ("ar_only", 1, ["context"]),
        ("colocated", 1, ["context", "denoiser"]),
        ("split", 1, ["context", "denoiser"]),
        ("split", 2, ["context", "denoiser 0", "denoiser 1"]),
    ],
)
def test_a_cell_tells_of_all_towers_it_should_have(placement: str, denoisers: int, names: list[str]) -> None:
    told = Told(placement, denoisers)
    assert [(sign.name, sign.answers) for sign in told.signs.now([])] == [(name, False) for name in names]
    processes = [100, 100] if placement == "colocated" else [100, 101, 102]
    homes = [{"pid": str(pid)} for pid in dict.fromkeys(processes)]
    stats = [EngineStats(name.split()[0], process=pid) for name, pid in zip(names, processes, strict=False)]
    told.signs.hears(stats, homes)
    assert [sign.name for sign in told.signs.now(homes) if sign.answers] == names
