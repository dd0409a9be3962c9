"""What passes cost, from readings: medians, and for numbers of rows that were never seen."""

import time

import pytest
import torch

from twotower.engine.meter import Meter, Pass
from twotower.engine.steps import clock_for


def _noted(meter: Meter, rows: int, seconds: float, times: int = 5, kind: Pass = Pass.STEP) -> None:
    """Equal readings would count as one."""
    for number in range(times):
        meter.note(kind, rows, seconds + 1e-9 * number)


def _metered(**readings: float) -> Meter:
    meter = Meter()
    for name, seconds in readings.items():
        _noted(meter, int(name.removeprefix("rows")), seconds)
    return meter


def test_a_kind_that_was_hardly_seen_costs_nobody_knows_what() -> None:
    meter = _metered(rows4=0.1)
    _noted(meter, 4, 0.1, 4, Pass.READ)
    assert meter.seconds(Pass.TOKEN, 4) is None and meter.seconds(Pass.READ, 4) is None
    assert meter.seconds(Pass.STEP, 4) == pytest.approx(0.1)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 8, 16, 64])
def test_it_is_a_line_also_beyond_what_was_seen(rows: int) -> None:
    assert _metered(rows2=0.12, rows4=0.14, rows8=0.18).seconds(Pass.STEP, rows) == pytest.approx(0.1 + 0.01 * rows)


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_of_one_number_of_rows_all_others_are_hoped_to_cost_as_much(rows: int) -> None:
    assert _metered(rows4=0.1).seconds(Pass.STEP, rows) == pytest.approx(0.1)


def test_more_rows_take_no_less_and_no_more_in_proportion() -> None:
    falling, steep = _metered(rows2=0.2, rows8=0.1), _metered(rows2=0.1, rows4=0.8)
    assert falling.seconds(Pass.STEP, 16) == pytest.approx(falling.seconds(Pass.STEP, 64), rel=0.1)
    sixteen, more = steep.seconds(Pass.STEP, 16), steep.seconds(Pass.STEP, 64)
    assert sixteen is not None and more is not None and 2 * sixteen < more <= 4 * sixteen + 1e-9


@pytest.mark.parametrize("rows", [4, 8, 16, 32])
def test_a_curve_is_followed_where_it_was_seen(rows: int) -> None:
    """A device that is not full takes little more for more rows, then as much for each."""
    curve = {4: 0.010, 8: 0.010, 16: 0.012, 32: 0.024}
    meter = _metered(**{f"rows{seen}": seconds for seen, seconds in curve.items()})
    assert meter.seconds(Pass.STEP, rows) == pytest.approx(curve[rows], rel=0.2)


def test_first_passes_that_take_long_are_outvoted() -> None:
    meter = Meter()
    for seconds in (2.0, 0.9, 0.11, 0.1, 0.12):
        meter.note(Pass.STEP, 16, seconds)
    assert meter.seconds(Pass.STEP, 16) == pytest.approx(0.12)
    meter.note(Pass.STEP, 64, 9.0)
    assert meter.seconds(Pass.STEP, 64) == pytest.approx(0.12), "one reading says nothing"


def test_it_follows_a_pass_that_gets_dearer() -> None:
    meter = _metered(rows4=0.1)
    _noted(meter, 4, 0.1, 30)
    _noted(meter, 4, 0.2, 11)
    assert meter.seconds(Pass.STEP, 4) == pytest.approx(0.2)


def test_what_was_not_seen_again_for_long_is_hoped_for_anew() -> None:
    meter = _metered(rows4=0.1, rows16=0.4)
    _noted(meter, 4, 0.1, 5000)
    assert meter.seconds(Pass.STEP, 16) == pytest.approx(0.1, rel=0.01)
    _noted(meter, 16, 0.4)
    assert meter.seconds(Pass.STEP, 16) == pytest.approx(0.4, rel=0.05)


def test_a_reading_counts_once_whoever_tells_it() -> None:
    meter = Meter()
    for _ in range(16):
        meter.note(Pass.STEP, 4, 0.2)
    assert meter.seconds(Pass.STEP, 4) is None


def test_on_a_cpu_a_pass_is_not_charged_for_what_others_do_meanwhile() -> None:
    clock = clock_for(torch.device("cpu"))
    before = clock()
    time.sleep(0.05)
    assert clock() - before < 0.05
    assert clock_for(torch.device("cuda")) is time.perf_counter
