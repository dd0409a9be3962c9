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


def test_one_reading_tells_of_more_rows_half_of_the_rest() -> None:
    meter = _metered(rows4=0.1)
    assert meter.seconds(Pass.STEP, 1) == 0.1, "fewer rows may cost as much"
    assert meter.seconds(Pass.STEP, 8) == pytest.approx(0.15)


@pytest.mark.parametrize(("rows", "seconds"), [(1, 0.1), (2, 0.1), (4, 0.2), (6, 0.3), (10, 0.5), (12, 0.6), (20, 1.0)])
def test_between_and_beyond_readings_it_is_a_line(rows: int, seconds: float) -> None:
    assert _metered(rows2=0.1, rows8=0.4, rows10=0.5).seconds(Pass.STEP, rows) == pytest.approx(seconds)


def test_more_rows_never_cost_less() -> None:
    assert _metered(rows2=0.5, rows8=0.1).seconds(Pass.STEP, 64) == 0.5


def test_readings_are_smoothed_and_follow_the_machine() -> None:
    meter = Meter()
    for seconds in (0.1, 0.2):
        meter.note(Pass.TOKEN, 4, seconds)
    assert meter.seconds(Pass.TOKEN, 4) == pytest.approx(0.12)
    for _ in range(30):
        meter.note(Pass.TOKEN, 4, 1.0)
    assert meter.seconds(Pass.TOKEN, 4) == pytest.approx(1.0, rel=0.01)


def test_a_pass_that_was_recorded_meanwhile_hardly_counts() -> None:
    meter = _metered(rows4=0.1)
    meter.note(Pass.STEP, 4, 5.0)
    assert meter.seconds(Pass.STEP, 4) == pytest.approx(0.14)
