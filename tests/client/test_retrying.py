"""When a call is sent again, with a clock and dice that are made up."""

import random

import pytest

from twotower_client import InternalError, Overloaded, RetryPolicy, ServiceError, Unavailable
from twotower_client.errors import Details
from twotower_client.retrying import Tries


def unavailable(hint_s: float | None = None) -> Unavailable:
    return Unavailable("gone", Details("UNAVAILABLE", retry_after_s=hint_s))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def pauses(policy: RetryPolicy, error: ServiceError, timeout_s: float | None = None, share: float = 1.0) -> list[float]:
    """Until the error is raised; time passes only in pauses."""
    clock = Clock()
    tries = Tries(policy, timeout_s, lambda low, high: low + share * (high - low), clock)
    slept: list[float] = []
    while True:
        left_s = tries.begin()
        assert (left_s is None) == (timeout_s is None)
        if timeout_s is not None:
            assert left_s == pytest.approx(timeout_s - sum(slept))
        try:
            slept.append(tries.pause_s(error))
        except ServiceError as raised:
            assert type(raised) is type(error) and raised.attempts == len(slept) + 1 == tries.made
            return slept
        clock.now += slept[-1]


def test_the_longest_pause_doubles_up_to_a_limit() -> None:
    policy = RetryPolicy(attempts=6, first_s=1, factor=2, longest_s=5)
    assert pauses(policy, unavailable()) == [1, 2, 4, 5, 5]
    assert pauses(policy, unavailable(), share=0.25) == [0.25, 0.5, 1, 1.25, 1.25]
    assert pauses(policy, unavailable(3.0)) == [4, 5, 7, 8, 8]
    assert pauses(RetryPolicy(attempts=1), unavailable()) == []


def test_a_pause_is_drawn_between_nothing_and_the_longest() -> None:
    policy, dice = RetryPolicy(attempts=100, first_s=2, factor=1), random.Random(1)
    drawn = []
    for _ in range(200):
        tries = Tries(policy, None, dice.uniform)
        tries.begin()
        drawn.append(tries.pause_s(unavailable()))
    assert 0 <= min(drawn) < 0.1 and 1.9 < max(drawn) <= 2 and 0.85 < sum(drawn) / len(drawn) < 1.15


def test_deadline_and_hints() -> None:
    policy = RetryPolicy(attempts=9, first_s=1, factor=2, longest_s=60, longest_hint_s=30)
    assert pauses(policy, unavailable(), timeout_s=8) == [1, 2, 4]
    assert pauses(policy, unavailable(), timeout_s=1) == []
    assert len(pauses(policy, unavailable(30))) == 8 and pauses(policy, unavailable(30.5)) == []


def test_what_would_not_go_better() -> None:
    policy = RetryPolicy()
    assert pauses(policy, InternalError("fault", Details("INTERNAL"))) == []
    assert pauses(policy, Overloaded("too large", Details("RESOURCE_EXHAUSTED"))) == []
    assert len(pauses(policy, Overloaded("full", Details("RESOURCE_EXHAUSTED", retry_after_s=0.0)))) == 4
    tries = Tries(policy, None)
    tries.begin()
    with pytest.raises(Unavailable):
        tries.pause_s(unavailable(), streamed=True)
