"""What is kept over time stays within its bounds, and lies on one axis for all routers."""

import pytest

from cluster.board.history import COARSE_POINTS, FINE_POINTS, MOST_EVENTS, Event, History, Told, merged_events
from cluster.board.series import (
    FIRST_TOKEN_BOUNDS,
    KEPT,
    Point,
    across_routers,
    first_token_place,
    first_token_quantile,
)


def point(t: int, firsts: dict[int, int] | None = None, **values: float) -> Point:
    return Point(t, tuple(values.get(series.name, 0.0) for series in KEPT), firsts or {})


def test_ten_seconds_are_the_mean_of_those_that_were_seen() -> None:
    history = History()
    for t, tokens in ((20, 10.0), (21, 30.0), (29, 50.0), (30, 7.0)):
        history.add(point(t, {2: 1}, tokens=tokens))
    assert {t: (one["tokens"], dict(one.firsts)) for t, one in history.coarse.items()} == {
        20: (30.0, {2: 3}),
        30: (7.0, {2: 1}),
    }


def test_memory_is_bounded() -> None:
    history = History()
    for t in range(FINE_POINTS + 100):
        history.add(point(t))
        history.note(t * 20.0, "failed", "request failed")
    assert len(history.fine) == FINE_POINTS and min(history.fine) == 100
    assert len(history.coarse) == FINE_POINTS // 10 + 10 and len(history.events) == MOST_EVENTS
    far = History()
    far.hear(Told((), tuple(point(t) for t in range(0, 10 * COARSE_POINTS, 10))))
    far.add(point(10 * COARSE_POINTS))
    assert len(far.coarse) == COARSE_POINTS and min(far.coarse) == 10


def test_what_happens_again_soon_is_one_event() -> None:
    history = History()
    for t, kind in ((1.0, "failed"), (5.0, "moved"), (9.0, "failed"), (30.0, "failed")):
        history.note(t, kind, "x")
    assert history.events == (Event(1.0, "failed", "x", 2), Event(5.0, "moved", "x"), Event(30.0, "failed", "x"))


def test_another_router_takes_it_over_and_then_what_is_new() -> None:
    history, other = History(), History()
    for t in range(100):
        history.add(point(t, tokens=t))
    history.note(99.0, "cell", "cell a has come")
    other.hear(history.told())
    history.add(point(100, tokens=1.0))
    told = history.told(other.last)
    assert [one.t for one in told.fine] == [94, 95, 96, 97, 98, 99, 100]
    other.hear(told)
    assert (other.fine, other.coarse, other.events) == (history.fine, history.coarse, history.events)


def test_points_of_another_version_are_left_out() -> None:
    history = History()
    history.hear(Told((Point(1, (1.0, 2.0)),), (), ()))
    assert history.fine == {}


def test_across_routers_own_counts_are_summed_and_what_all_hear_is_not() -> None:
    both = across_routers(7, [point(7, {1: 1}, tokens=3.0, cells=2.0), point(7, {1: 2}, tokens=4.0, cells=2.0)])
    assert (both.t, both["tokens"], both["cells"], both.firsts) == (7, 7.0, 2.0, {1: 3})


def test_what_all_routers_have_seen_is_one_event() -> None:
    seen = [Event(1.0, "lost", "cell a is lost"), Event(2.0, "lost", "cell a is lost")]
    own = [Event(1.5, "failed", "request failed", 2), Event(3.0, "failed", "request failed", 3)]
    assert merged_events([*own, *seen]) == [
        Event(1.0, "lost", "cell a is lost", 1),
        Event(1.5, "failed", "request failed", 5),
    ]
    assert len(merged_events([*seen, Event(90.0, "lost", "cell a is lost")])) == 2


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.0101, 1.0, 599.0, 1e6])
def test_a_first_token_is_counted_within_its_bound(seconds: float) -> None:
    place = first_token_place(seconds)
    assert seconds <= FIRST_TOKEN_BOUNDS[place] or place == len(FIRST_TOKEN_BOUNDS) - 1
    assert place == 0 or seconds > FIRST_TOKEN_BOUNDS[place - 1]


def test_quantiles_of_first_tokens() -> None:
    assert first_token_quantile({}, 0.5) is None
    assert first_token_quantile({3: 10}, 0.5) == pytest.approx((FIRST_TOKEN_BOUNDS[2] + FIRST_TOKEN_BOUNDS[3]) / 2)
    assert first_token_quantile({0: 90, 9: 10}, 0.95) == pytest.approx(
        (FIRST_TOKEN_BOUNDS[8] + FIRST_TOKEN_BOUNDS[9]) / 2
    )
    assert first_token_quantile({0: 90, 9: 10}, 0.9) == FIRST_TOKEN_BOUNDS[0]
