"""The pair's promises to whoever asks: order, deadlines, cancelling, honest errors, and room given back."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest

from tests.engine.decode import plain_request
from twotower.core import BlockEvent, Event, FailureEvent, FinishReason, Mode, ReleasedEvent, Request
from twotower.core import RequestId as Id
from twotower.engine.handle import EngineStats
from twotower.engine.ledger import Ledger
from twotower.engine.pair import Pair
from twotower.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NumericalError,
    Overloaded,
    TwoTowerError,
    Unavailable,
)
from twotower.model.room import Room

LONG = 200
MODES = pytest.mark.parametrize("mode", list(Mode))


def _block(name: str, start: int = 0, reason: FinishReason | None = None, tokens: Sequence[int] = (9,)) -> BlockEvent:
    return BlockEvent(Id(name), start, tuple(tokens), 2, 1, reason)


class FakeEngine:
    """An engine that does nothing but what the test says."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.cancelled: list[str] = []
        self.broken: TwoTowerError | None = None
        self._said: asyncio.Queue[list[Event] | Exception] = asyncio.Queue()

    def say(self, *events: Event) -> None:
        self._said.put_nowait(list(events))

    def die(self, error: Exception) -> None:
        self._said.put_nowait(error)

    def add(self, requests: Sequence[Request]) -> None:
        if self.broken is not None:
            raise self.broken
        self.added += [request.id for request in requests]

    def cancel(self, request_ids: Sequence[Id]) -> None:
        self.cancelled += request_ids

    async def events(self) -> list[Event]:
        said = await self._said.get()
        if isinstance(said, Exception):
            raise said
        return said

    async def stats(self) -> list[EngineStats]:
        return []


@asynccontextmanager
async def _fake(slots: int = 1, pages: int = 100, queued: int = 4) -> AsyncIterator[tuple[Pair, FakeEngine]]:
    engine = FakeEngine()
    async with Pair(engine, [engine], Ledger(Room(slots, pages), [], queued)) as pair:
        yield pair, engine


async def _events(pair: Pair, request: Request, timeout_s: float | None = None) -> list[BlockEvent]:
    return [event async for event in pair.generate(request, timeout_s)]


async def _settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_requests_start_in_order_as_room_comes_free() -> None:
    async with _fake(slots=2) as (pair, engine):
        tasks = [asyncio.create_task(_events(pair, plain_request(name))) for name in range(5)]
        await _settled()
        assert engine.added == ["0", "1"]
        engine.say(_block("1", reason=FinishReason.STOP))
        await _settled()
        assert tasks[1].done() and engine.added == ["0", "1"], "room is free when the engine says so, not before"
        engine.say(ReleasedEvent(Id("1")))
        await _settled()
        assert engine.added == ["0", "1", "2"]
        for name in ("0", "2", "3", "4"):
            engine.say(_block(name, reason=FinishReason.LENGTH), ReleasedEvent(Id(name)))
            await _settled()
        assert engine.added == ["0", "1", "2", "3", "4"]
        assert all(events[-1].finish_reason for events in await asyncio.gather(*tasks))
        assert pair.ledger.running == pair.ledger.waiting == 0


async def test_overloaded_before_the_first_event() -> None:
    async with _fake(slots=1, queued=1) as (pair, engine):
        tasks = [asyncio.create_task(_events(pair, plain_request(name))) for name in range(2)]
        await _settled()
        with pytest.raises(Overloaded):
            await _events(pair, plain_request("late"))
        assert engine.added == ["0"]
        for task in tasks:
            task.cancel()
        await _settled()
        assert engine.cancelled == ["0"] and pair.ledger.waiting == 0


async def test_a_request_id_cannot_run_twice() -> None:
    async with _fake(slots=4) as (pair, engine):
        first = asyncio.create_task(_events(pair, plain_request("a")))
        await _settled()
        with pytest.raises(InvalidRequest, match="request_id: got 'a', which is already running here"):
            await _events(pair, plain_request("a"))
        engine.say(_block("a", reason=FinishReason.STOP))
        assert len(await first) == 1
        with pytest.raises(Overloaded, match="still being released"):
            await _events(pair, plain_request("a"))  # its slot is not back yet
        engine.say(ReleasedEvent(Id("a")))
        await _settled()
        again = asyncio.create_task(_events(pair, plain_request("a")))
        await _settled()
        engine.say(_block("a", reason=FinishReason.STOP))
        assert len(await again) == 1


async def test_a_request_that_can_never_fit_is_invalid() -> None:
    async with _fake(pages=2) as (pair, engine):
        with pytest.raises(InvalidRequest, match="whole cache"):
            await _events(pair, plain_request("a", new=LONG))
        assert engine.added == [] and pair.ledger.waiting == 0


async def test_a_pair_without_a_denoiser_decodes_ar_only() -> None:
    engine = FakeEngine()
    async with Pair(engine, [], Ledger(Room(1, 100), [], 4)) as pair:
        for mode in (Mode.DIFFUSION, Mode.MOCK_AR):
            with pytest.raises(InvalidRequest, match=f"mode: got {mode}, wanted ar"):
                await _events(pair, plain_request("a", mode))


async def test_walking_away_from_the_head_of_the_queue_lets_the_next_in() -> None:
    async with _fake(slots=4, pages=4) as (pair, engine):
        running = asyncio.create_task(_events(pair, plain_request("running", new=16)))
        await _settled()
        big = asyncio.create_task(_events(pair, plain_request("big", new=48)))
        await _settled()
        small = asyncio.create_task(_events(pair, plain_request("small", new=16)))
        await _settled()
        assert engine.added == ["running"]
        big.cancel()
        await _settled()
        assert engine.added == ["running", "small"], "small waited for a request that is gone"
        assert engine.cancelled == []
        for task in (running, small):
            task.cancel()


async def test_deadline_while_waiting_and_while_running() -> None:
    async with _fake(slots=1) as (pair, engine):
        running = asyncio.create_task(_events(pair, plain_request("running"), 0.05))
        waiting = asyncio.create_task(_events(pair, plain_request("waiting"), 0.02))
        for task, name in ((waiting, "waiting"), (running, "running")):
            with pytest.raises(DeadlineExceeded, match=f"request {name}: not finished within"):
                await task
        await _settled()
        assert engine.added == engine.cancelled == ["running"]
        assert pair.ledger.running == 1, "the slot is not free before the engine says so"
        engine.say(ReleasedEvent(Id("running")))
        await _settled()
        assert pair.ledger.running == pair.ledger.waiting == 0


async def test_deadline_while_the_reader_is_busy() -> None:
    """The deadline frees the sequence on time and never breaks into what the reader is doing."""
    async with _fake() as (pair, engine), aclosing(pair.generate(plain_request("a", Mode.DIFFUSION), 0.05)) as events:
        engine.say(_block("a"), _block("a", 1))
        assert (await anext(events)).start == 0
        await asyncio.sleep(0.15)
        assert engine.cancelled == ["a"]
        engine.say(_block("a", 2, FinishReason.STOP))
        await _settled()
        assert (await anext(events)).start == 1
        with pytest.raises(DeadlineExceeded):
            await anext(events)


async def test_a_slow_reader_of_a_causal_mode_gets_tokens_together() -> None:
    async with _fake() as (pair, engine), aclosing(pair.generate(plain_request("a", Mode.MOCK_AR))) as events:
        engine.say(_block("a"))
        assert (await anext(events)).token_ids == (9,)
        engine.say(_block("a", 1), _block("a", 2), _block("a", 3, FinishReason.LENGTH))
        await _settled()
        merged = await anext(events)
        assert merged == BlockEvent(Id("a"), 1, (9, 9, 9), 6, 3, FinishReason.LENGTH)
        with pytest.raises(StopAsyncIteration):
            await anext(events)


async def test_a_failure_is_raised_after_what_came_before_it() -> None:
    async with _fake() as (pair, engine):
        async with aclosing(pair.generate(plain_request("a", Mode.AR))) as events:
            await_first = asyncio.create_task(anext(events))
            await _settled()
            engine.say(_block("a"), _block("a", 1), FailureEvent(Id("a"), NumericalError("boom")), _block("a", 2))
            assert (await await_first).token_ids == (9, 9)
            with pytest.raises(NumericalError, match="boom"):
                await anext(events)
        assert engine.cancelled == [], "the engine has ended it by itself"


@pytest.mark.parametrize("error", [Unavailable("gone"), RuntimeError("a bug")])
async def test_a_dying_engine_ends_everything(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "twotower")
    async with _fake() as (pair, engine):
        tasks = [asyncio.create_task(_events(pair, plain_request(name))) for name in range(3)]
        await _settled()
        engine.die(error)
        for task in tasks:
            with pytest.raises(Unavailable):
                await task
        with pytest.raises(Unavailable, match="cannot serve"):
            await _events(pair, plain_request("later"))


async def test_an_engine_that_takes_no_requests_ends_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "twotower")
    async with _fake() as (pair, engine):
        engine.broken = Unavailable("gone")
        with pytest.raises(Unavailable, match="gone"):
            await _events(pair, plain_request("a"))
        assert pair.failure is not None


@asynccontextmanager
async def _three(denoisers: int = 2, slots: int = 4) -> AsyncIterator[tuple[Pair, list[FakeEngine], list[int | None]]]:
    """A context engine, denoisers with mirrors of their own, and what was lost."""
    engines, lost = [FakeEngine() for _ in range(1 + denoisers)], list[int | None]()
    rooms = [Room(slots, 100) for _ in engines]
    async with Pair(engines[0], engines[1:], Ledger(rooms[0], rooms[1:], 4), lost.append) as pair:
        yield pair, engines, lost


def _ask(pair: Pair, name: str, mode: Mode = Mode.DIFFUSION) -> "asyncio.Task[list[BlockEvent]]":
    return asyncio.create_task(_events(pair, plain_request(name, mode)))


async def test_a_lost_denoiser_takes_its_own_requests_with_it_and_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "twotower")
    async with _three() as (pair, (context, first, second), lost):
        tasks = {name: _ask(pair, name) for name in ("a", "b")} | {"c": _ask(pair, "c", Mode.AR)}
        await _settled()
        assert (first.added, second.added, context.added) == (["a"], ["b"], ["c"])
        first.die(Unavailable("killed"))
        with pytest.raises(Unavailable, match="killed"):
            await tasks["a"]
        assert lost == [0] and pair.failure is None and pair.serves(Mode.DIFFUSION)
        tasks["a"] = _ask(pair, "a")  # as a run does it that goes on
        await _settled()
        assert second.added == ["b", "a"], "the other denoiser takes what is left"
        for engine, name in ((second, "a"), (second, "b"), (context, "c")):
            engine.say(_block(name, reason=FinishReason.STOP), ReleasedEvent(Id(name)))
            await tasks[name]
        assert pair.ledger.context.free_slots == 3, (
            "the lost one's room is taken until the context tower has forgotten it"
        )


async def test_without_a_denoiser_the_context_tower_serves_what_needs_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "twotower")
    async with _three(denoisers=1, slots=1) as (pair, (context, denoiser), _):
        runs, waits, own = _ask(pair, "a"), _ask(pair, "b"), _ask(pair, "c", Mode.AR)
        await _settled()
        denoiser.die(Unavailable("killed"))
        for task in (runs, waits):
            with pytest.raises(Unavailable, match="killed"):
                await task
        with pytest.raises(Unavailable, match="cannot serve: killed"):
            await _events(pair, plain_request("d", Mode.DIFFUSION))
        assert pair.serves(Mode.AR) and not pair.serves(Mode.MOCK_AR)
        assert not own.done() and context.added == [], "there is one slot, which the lost request may still hold"
        pair.regain(0)
        await _settled()
        assert context.added == ["c"]
        trial = pair.replace(0, another := FakeEngine())
        context.say(_block("c", reason=FinishReason.STOP), ReleasedEvent(Id("c")))
        await own
        assert not pair.serves(Mode.DIFFUSION), "it is on trial"
        with pytest.raises(Unavailable, match="cannot serve: killed"):
            await _events(pair, plain_request("d", Mode.DIFFUSION))
        tested = asyncio.create_task(_all(trial.generate(plain_request("test", Mode.DIFFUSION))))
        await _settled()
        assert another.added == ["test"]
        another.say(_block("test", reason=FinishReason.STOP), ReleasedEvent(Id("test")))
        await tested
        pair.accept(0)
        late = _ask(pair, "d")
        await _settled()
        assert another.added == ["test", "d"] and pair.lost == {}
        another.say(_block("d", reason=FinishReason.STOP), ReleasedEvent(Id("d")))
        await late
        assert pair.ledger.context.free_slots == pair.ledger.mirrors[0].free_slots == 1


async def _all(events: AsyncIterator[BlockEvent]) -> list[BlockEvent]:
    return [event async for event in events]


@pytest.mark.parametrize("waiting", [False, True])
async def test_a_denoiser_that_is_lost_again_on_trial(waiting: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "twotower")
    async with _three(slots=1) as (pair, (context, first, second), lost):
        first.die(Unavailable("killed"))
        await _settled()
        hogs = [_ask(pair, "ar", Mode.AR)] if waiting else []
        await _settled()
        trial = pair.replace(0, another := FakeEngine())
        tested = asyncio.create_task(_all(trial.generate(plain_request("test", Mode.DIFFUSION))))
        await _settled()
        assert another.added == ([] if waiting else ["test"]) and second.added == [], "it is for that denoiser alone"
        another.die(Unavailable("killed again"))
        with pytest.raises(Unavailable, match="killed again"):
            await tested
        assert lost == [0, 0] and list(pair.lost) == [0] and pair.serves(Mode.DIFFUSION)
        if waiting:
            context.say(_block("ar", reason=FinishReason.STOP), ReleasedEvent(Id("ar")))
            await hogs[0]
        pair.replace(0, FakeEngine())
        pair.accept(0)
        assert [room.free_slots for room in (pair.ledger.context, *pair.ledger.mirrors)] == [1, 1, 1]


async def test_nobody_hears_of_the_end_of_an_engine_that_was_replaced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "twotower")
    async with _three(denoisers=1) as (pair, (_, old), lost):
        pair.lose(0, Unavailable("its self-test failed"))
        pair.replace(0, FakeEngine())
        pair.accept(0)
        old.die(Unavailable("killed"))
        await _settled()
        assert lost == [0] and pair.lost == {} and pair.serves(Mode.DIFFUSION)


async def test_a_lost_context_engine_ends_everything_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "twotower")
    async with _three() as (pair, (context, first, _), lost):
        tasks = [_ask(pair, "a"), _ask(pair, "c", Mode.AR)]
        await _settled()
        first.die(Unavailable("lost its link"))
        context.die(Unavailable("killed"))
        await _settled()
        for task in tasks:
            with pytest.raises(Unavailable):
                await task
        assert lost == [0, None] and str(pair.failure) == "killed"
        assert not any(pair.serves(mode) for mode in Mode)


async def test_closing_ends_what_runs_and_refuses_what_comes() -> None:
    async with _fake() as (pair, _):
        task = asyncio.create_task(_events(pair, plain_request("a")))
        await _settled()
    with pytest.raises(Unavailable, match="shutting down"):
        await task
    with pytest.raises(Unavailable, match="shutting down"):
        await _events(pair, plain_request("b"))


# From here on with real towers.
