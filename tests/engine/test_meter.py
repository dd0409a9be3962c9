"""What passes cost, from readings: smoothed, and for numbers of rows that were never seen."""

import pytest

from twotower.engine.meter import Meter, Pass


def _metered(**readings: float) -> Meter:
    meter = Meter()
    for name, seconds in readings.items():
        meter.note(Pass.STEP, int(name.removeprefix("rows")), seconds)
    return meter


def test_a_kind_that_was_never_seen_costs_nobody_knows_what() -> None:
    meter = _metered(rows4=0.1)
    assert meter.seconds(Pass.READ, 4) is None and meter.seconds(Pass.STEP, 4) == 0.1


@pytest.mark.parametrize(("rows", "seconds"), [(1, 0.1), (2, 0.1), (3, 0.15), (4, 0.2), (6, 0.3), (8, 0.4), (64, 0.4)])
def test_between_readings_it_is_a_line_and_beyond_them_a_hope(rows: int, seconds: float) -> None:
    assert _metered(rows2=0.1, rows4=0.2, rows8=0.4).seconds(Pass.STEP, rows) == pytest.approx(seconds)


def test_what_was_not_seen_again_for_long_is_hoped_for_anew() -> None:
    meter = _metered(rows4=0.1, rows16=0.4)
    for number in range(5000):
        meter.note(Pass.STEP, 4, 0.1 + 1e-9 * (number % 2))
    assert meter.seconds(Pass.STEP, 16) == pytest.approx(0.1)
    meter.note(Pass.STEP, 16, 0.4)
    assert meter.seconds(Pass.STEP, 16) == pytest.approx(0.4)


def _noted(meter: Meter, kind: Pass, seconds: float, times: int) -> None:
    for number in range(times):
        meter.note(kind, 4, seconds + 1e-9 * number)


@pytest.mark.parametrize("apart", [False, True])
def test_what_slows_one_kind_of_pass_down_is_taken_for_the_machine(apart: bool) -> None:
    meter = Meter(apart)
    meter.note(Pass.STEP, 4, 0.1)
    _noted(meter, Pass.TOKEN, 0.1, 2)
    _noted(meter, Pass.TOKEN, 0.2, 30)
    assert meter.seconds(Pass.TOKEN, 4) == pytest.approx(0.2, rel=0.01)
    step = meter.seconds(Pass.STEP, 4)
    assert step == pytest.approx(0.1 if apart else 0.174, rel=0.01), "another machine's pass is as quick as before"


def test_a_pass_that_was_not_seen_for_long_is_judged_by_itself() -> None:
    meter = Meter()
    meter.note(Pass.STEP, 4, 0.1)
    _noted(meter, Pass.TOKEN, 0.1, 100)
    meter.note(Pass.STEP, 4, 0.025)
    assert meter.seconds(Pass.STEP, 4) == pytest.approx(0.05), "half of the way, in the logarithm"
    assert meter.seconds(Pass.TOKEN, 4) == pytest.approx(0.1, rel=0.01)


def test_a_reading_counts_once_whoever_tells_it() -> None:
    once, often = _metered(rows4=0.1), _metered(rows4=0.1)
    once.note(Pass.STEP, 4, 0.2)
    for _ in range(16):
        often.note(Pass.STEP, 4, 0.2)
    assert once.seconds(Pass.STEP, 4) == often.seconds(Pass.STEP, 4) != 0.1


def test_a_pass_that_was_recorded_meanwhile_hardly_counts() -> None:
    meter = _metered(rows4=0.1)
    meter.note(Pass.STEP, 4, 5.0)
    assert meter.seconds(Pass.STEP, 4) == pytest.approx(0.1 * 3**0.25)
