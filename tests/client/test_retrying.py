"""When a call is sent again, with a clock and dice that are made up."""

import asyncio
import random
from collections.abc import AsyncGenerator, Generator
from typing import Any

import pytest

from twotower_client import (
    Answer,
    AsyncClient,
    Client,
    Finished,
    InternalError,
    Overloaded,
    RetryPolicy,
    ServiceError,
    Unavailable,
    Usage,
)
from twotower_client.asking import Ask
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


class Face:
    """Fails twice; notes what it was asked each time, and how long it was given."""

    def __init__(self) -> None:
        self.asked: list[Ask] = []
        self.given_s: list[float] = []

    def _note(self, ask: Ask, timeout_s: float | None) -> None:
        self.asked.append(ask)
        self.given_s.append(timeout_s or 0.0)
        if len(self.asked) < 3:
            raise unavailable()

    def complete(self, ask: Ask, timeout_s: float | None) -> Answer:
        self._note(ask, timeout_s)
        return Answer("a", (1,), "stop", Usage(), 1, None, ask.request_id)

    def stream(self, ask: Ask, timeout_s: float | None) -> Generator[Finished, None, None]:
        self._note(ask, timeout_s)
        yield Finished("stop", Usage(), 1, None)


class AsyncFace(Face):
    async def complete(self, ask: Ask, timeout_s: float | None) -> Answer:  # type: ignore[override]
        return super().complete(ask, timeout_s)

    async def stream(self, ask: Ask, timeout_s: float | None) -> AsyncGenerator[Finished, None]:  # type: ignore[override]
        for event in super().stream(ask, timeout_s):
            yield event


@pytest.mark.parametrize("streams", [False, True])
def test_all_attempts_have_one_label_and_one_deadline(streams: bool) -> None:
    blocking, waiting = Face(), AsyncFace()
    client: Any = Client("grpc://unused", retry=RetryPolicy(first_s=0.01), face=blocking)  # type: ignore[arg-type]
    answer = client.stream("Hi", timeout_s=60).rest() if streams else client.complete("Hi", timeout_s=60)

    async def ask() -> Answer:
        other: Any = AsyncClient("grpc://unused", retry=RetryPolicy(first_s=0.01), face=waiting)  # type: ignore[arg-type]
        told = other.stream("Hi", timeout_s=60).rest() if streams else other.complete("Hi", timeout_s=60)
        answer: Answer = await told
        return answer

    for face, told in ((blocking, answer), (waiting, asyncio.run(ask()))):
        first, *others = face.asked
        assert len(others) == 2 and all(other is first for other in others)
        assert told.request_id == first.request_id and told.attempts == 3
        assert 60 >= face.given_s[0] > face.given_s[1] > face.given_s[2] > 50
