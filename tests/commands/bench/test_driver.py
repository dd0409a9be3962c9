"""When requests are sent, and from when their time counts. The clock is made up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import islice, pairwise

import pytest

from tests.commands.bench.virtual_time import run
from twotower.commands.bench import driver
from twotower.commands.bench.driver import Driver, arrivals
from twotower.commands.bench.load import Load
from twotower.commands.bench.samples import Pass, Sample
from twotower_client import Block, Event, Finished, Unavailable, Usage
from twotower_client.errors import Details


class MadeUpService:
    """Two blocks of four tokens: one after 1 s, one after another half. `at_once`: how many it serves at a time; the
    others wait. `fails`: the numbers of requests that end with an error instead of their second block."""

    def __init__(self, at_once: int = 1_000, fails: tuple[int, ...] = ()) -> None:
        self._places, self._fails = asyncio.Semaphore(at_once), fails
        self.numbers: list[int] = []

    @asynccontextmanager
    async def __call__(self, number: int) -> AsyncIterator[AsyncIterator[Event]]:
        self.numbers.append(number)
        async with self._places:
            yield self._events(number)

    async def _events(self, number: int) -> AsyncIterator[Event]:
        block = Usage(0, 4, num_steps=2, num_blocks=1)
        await asyncio.sleep(1.0)
        yield Block(0, (1, 2, 3, 4), "abcd", block)
        await asyncio.sleep(0.5)
        if number in self._fails:
            raise Unavailable("gone", Details("UNAVAILABLE"))
        yield Block(4, (1, 2, 3, 4), "abcd", block)
        yield Block(8, (), "late text, no token", Usage())
        yield Finished("stop", Usage(3, 8, num_steps=4, num_blocks=2), 0, "ar")


def drive(load: Load, most_at_once: int = 4096, **service: object) -> tuple[Pass, list[Sample], MadeUpService]:
    async def driven() -> tuple[Pass, list[Sample], MadeUpService]:
        told: list[Sample] = []
        made_up = MadeUpService(**service)  # type: ignore[arg-type]
        return await Driver(made_up, load, 1, told.append, most_at_once).run("ar", 0), told, made_up

    return run(driven())


def test_a_closed_loop_sends_the_next_when_the_last_has_ended() -> None:
    one, told, service = drive(Load(2, None, 5, None))
    assert service.numbers == [0, 1, 2, 3, 4] == [sample.number for sample in one.samples]
    assert [sample.due_s for sample in one.samples] == pytest.approx([0, 0, 1.5, 1.5, 3])
    assert one.seconds == pytest.approx(4.5) and one.most_in_flight == 2 and len(told) == 5
    assert one.tokens == 40 and one.tokens_per_s == pytest.approx(40 / 4.5)
    for sample in one.samples:
        assert (sample.first_s, sample.latency_s, sample.late_s) == pytest.approx((1, 1.5, 0))
        assert sample.gaps_s == pytest.approx([0.5])


def test_seconds_end_what_is_sent_not_what_runs() -> None:
    one, _, _ = drive(Load(1, None, None, 4.0))
    assert len(one.samples) == 3 and one.seconds == pytest.approx(4.5)
    both, _, _ = drive(Load(1, None, 2, 4.0))
    assert len(both.samples) == 2


def test_seconds_alone_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "MAX_REQUESTS", 3)
    one, _, _ = drive(Load(1, None, None, 1e6))
    assert len(one.samples) == 3


def test_an_open_loop_waits_for_no_answer() -> None:
    due = list(islice(arrivals(10.0, 1), 30))
    one, _, _ = drive(Load(None, 10.0, 30, None))
    assert [sample.due_s for sample in one.samples] == pytest.approx(due)
    assert [sample.latency_s for sample in one.samples] == pytest.approx([1.5] * 30)
    assert one.most_in_flight > 5 and one.seconds == pytest.approx(due[-1] + 1.5)


def test_a_slow_service_does_not_slow_the_open_loop_down() -> None:
    """Else the waiting of requests that a closed loop would not have sent is left out: coordinated omission."""
    one, _, _ = drive(Load(None, 2.0, 20, None), at_once=1)
    due = list(islice(arrivals(2.0, 1), 20))
    end = 0.0
    for sample, at in zip(one.samples, due, strict=True):
        end = max(end, at) + 1.5
        assert sample.latency_s == pytest.approx(end - at) and sample.first_s == pytest.approx(end - at - 0.5)
        assert sample.late_s == pytest.approx(0)


def test_what_the_generator_itself_holds_back_counts_too() -> None:
    one, _, _ = drive(Load(None, 2.0, 20, None), most_at_once=1)
    assert one.most_in_flight == 1
    last = one.samples[-1]
    assert last.late_s > 10 and last.latency_s == pytest.approx(last.late_s + 1.5)


def test_arrivals_are_poissons_and_the_same_for_the_same_seed() -> None:
    at = list(islice(arrivals(50.0, 3), 5_000))
    gaps = [later - earlier for earlier, later in pairwise(at)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)
    assert at == list(islice(arrivals(50.0, 3), 5_000)) != list(islice(arrivals(50.0, 4), 5_000))


def test_a_failure_is_counted_and_the_others_go_on() -> None:
    one, told, _ = drive(Load(2, None, 6, None), fails=(1, 4))
    assert [sample.error for sample in one.samples] == [None, "UNAVAILABLE", None, None, "UNAVAILABLE", None]
    assert one.tokens == 4 * 8 and len(one.good) == 4 and len(told) == 6
