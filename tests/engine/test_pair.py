"""The pair's promises to whoever asks: order, deadlines, cancelling, honest errors, and room given back."""

import asyncio
import copy
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest
import torch

from tests.engine.decode import SETTINGS, Decoded, collect, decode_all
from tests.goldens import vendored
from twotower.core import BlockEvent, DecodingParams, Event, FailureEvent, FinishReason, Mode, ReleasedEvent, Request
from twotower.core import RequestId as Id
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.handle import EngineStats
from twotower.engine.in_process import colocated_runner, pair_of
from twotower.engine.ledger import Ledger, Room
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings
from twotower.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NumericalError,
    Overloaded,
    TwoTowerError,
    Unavailable,
)
from twotower.exchange.local import LocalExchange
from twotower.model.tower import ContextTower, DenoiserTower

LONG = 200
MODES = pytest.mark.parametrize("mode", list(Mode))


def _request(name: object, mode: Mode = Mode.AR, new: int = 16, prompt: Sequence[int] = (5, 6, 7)) -> Request:
    return Request(Id(str(name)), tuple(prompt), DecodingParams(mode=mode, max_new_tokens=new, ignore_eos=True))


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
        tasks = [asyncio.create_task(_events(pair, _request(name))) for name in range(5)]
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
        tasks = [asyncio.create_task(_events(pair, _request(name))) for name in range(2)]
        await _settled()
        with pytest.raises(Overloaded):
            await _events(pair, _request("late"))
        assert engine.added == ["0"]
        for task in tasks:
            task.cancel()
        await _settled()
        assert engine.cancelled == ["0"] and pair.ledger.waiting == 0


async def test_a_request_id_cannot_run_twice() -> None:
    async with _fake(slots=4) as (pair, engine):
        first = asyncio.create_task(_events(pair, _request("a")))
        await _settled()
        with pytest.raises(InvalidRequest, match="request_id: got 'a', which is already running here"):
            await _events(pair, _request("a"))
        engine.say(_block("a", reason=FinishReason.STOP))
        assert len(await first) == 1
        with pytest.raises(Overloaded, match="still being released"):
            await _events(pair, _request("a"))  # its slot is not back yet
        engine.say(ReleasedEvent(Id("a")))
        await _settled()
        again = asyncio.create_task(_events(pair, _request("a")))
        await _settled()
        engine.say(_block("a", reason=FinishReason.STOP))
        assert len(await again) == 1


async def test_a_request_that_can_never_fit_is_invalid() -> None:
    async with _fake(pages=2) as (pair, engine):
        with pytest.raises(InvalidRequest, match="whole cache"):
            await _events(pair, _request("a", new=LONG))
        assert engine.added == [] and pair.ledger.waiting == 0


async def test_a_pair_without_a_denoiser_decodes_ar_only() -> None:
    engine = FakeEngine()
    async with Pair(engine, [], Ledger(Room(1, 100), [], 4)) as pair:
        for mode in (Mode.DIFFUSION, Mode.MOCK_AR):
            with pytest.raises(InvalidRequest, match=f"mode: got {mode}, wanted ar"):
                await _events(pair, _request("a", mode))


async def test_walking_away_from_the_head_of_the_queue_lets_the_next_in() -> None:
    async with _fake(slots=4, pages=4) as (pair, engine):
        running = asyncio.create_task(_events(pair, _request("running", new=16)))
        await _settled()
        big = asyncio.create_task(_events(pair, _request("big", new=48)))
        await _settled()
        small = asyncio.create_task(_events(pair, _request("small", new=16)))
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
        running = asyncio.create_task(_events(pair, _request("running"), 0.05))
        waiting = asyncio.create_task(_events(pair, _request("waiting"), 0.02))
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
    async with _fake() as (pair, engine), aclosing(pair.generate(_request("a", Mode.DIFFUSION), 0.05)) as events:
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
    async with _fake() as (pair, engine), aclosing(pair.generate(_request("a", Mode.MOCK_AR))) as events:
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
        async with aclosing(pair.generate(_request("a", Mode.AR))) as events:
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
        tasks = [asyncio.create_task(_events(pair, _request(name))) for name in range(3)]
        await _settled()
        engine.die(error)
        for task in tasks:
            with pytest.raises(Unavailable):
                await task
        with pytest.raises(Unavailable, match="cannot serve"):
            await _events(pair, _request("later"))


async def test_an_engine_that_takes_no_requests_ends_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "twotower")
    async with _fake() as (pair, engine):
        engine.broken = Unavailable("gone")
        with pytest.raises(Unavailable, match="gone"):
            await _events(pair, _request("a"))
        assert pair.failure is not None


async def test_closing_ends_what_runs_and_refuses_what_comes() -> None:
    async with _fake() as (pair, _):
        task = asyncio.create_task(_events(pair, _request("a")))
        await _settled()
    with pytest.raises(Unavailable, match="shutting down"):
        await task
    with pytest.raises(Unavailable, match="shutting down"):
        await _events(pair, _request("b"))


# From here on with real towers.


class Engines:
    """Both engines over one cache, ticked by hand."""

    def __init__(self) -> None:
        model, settings = vendored("tt_moe"), EngineSettings(max_sequences=2, max_sequence_length=256)
        self.events: list[Event] = []
        self.context = ContextEngine(model.context, settings, self.events.append)
        exchange = LocalExchange(self.context.cache, lambda: None)
        self.context.connect(exchange.port)
        self.denoiser = DenoiserEngine(model.denoiser, exchange.link, settings, self.events.append)

    @property
    def free(self) -> tuple[int, int]:
        return self.context.cache.free_slots, self.context.cache.free_pages

    def tick(self) -> None:
        with torch.inference_mode():
            self.denoiser.tick()
            self.context.tick()


@MODES
@pytest.mark.parametrize("ticks", range(6))
def test_a_cancel_frees_slot_and_pages_within_one_tick(mode: Mode, ticks: int) -> None:
    engines = Engines()
    whole = engines.free
    engine = engines.context if mode is Mode.AR else engines.denoiser
    other = _request("other", Mode.DIFFUSION, new=LONG)
    engine.add(_request("a", mode, LONG))
    engines.denoiser.add(other)
    for _ in range(ticks):
        engines.tick()
    for either in (engines.context, engines.denoiser):
        either.cancel(Id("a"))
        either.cancel(Id("unknown"))
    engines.events.clear()
    engines.tick()
    assert engines.free[0] == whole[0] - 1 and engines.free[1] == whole[1] - -(-other.positions // 16)
    assert not [event for event in engines.events if isinstance(event, BlockEvent) and event.request_id == "a"]
    engines.tick()
    released = [event for event in engines.events if event.request_id == "a"]
    assert released == [ReleasedEvent(Id("a"))]


@MODES
async def test_leaving_the_iterator_frees_the_sequence(mode: Mode) -> None:
    model = vendored("tt_dense")
    async with pair_of(model.context, model.denoiser, SETTINGS) as pair:
        async for _ in pair.generate(_request("a", mode, LONG)):
            break
        await _all_free(pair)


@MODES
async def test_a_deadline_frees_the_sequence(mode: Mode) -> None:
    model = vendored("tt_dense")
    async with pair_of(model.context, model.denoiser, SETTINGS) as pair:
        with pytest.raises(DeadlineExceeded):
            await _events(pair, _request("a", mode, LONG), 0.03)
        await _all_free(pair)
        assert (await collect(pair, _request("a", mode, 4))).finish_reason is FinishReason.LENGTH


async def _all_free(pair: Pair) -> None:
    deadline = time.monotonic() + 10
    while pair.ledger.running and time.monotonic() < deadline:
        await asyncio.sleep(0.001)
    assert pair.ledger.running == 0
    assert (pair.ledger.context.slots, pair.ledger.context.pages) == (SETTINGS.max_sequences, SETTINGS.pages)
    for tower in await pair.context.stats():
        assert (tower.free_slots, tower.free_pages, tower.sequences) == (tower.total_slots, tower.total_pages, 0)


def _sick(token: int | None) -> tuple[ContextTower, DenoiserTower]:
    """Towers that give NaN for one token of the prompt, or for everything."""
    model = vendored("tt_moe")
    context, denoiser = copy.deepcopy(model.context), copy.deepcopy(model.denoiser)
    with torch.no_grad():
        if token is not None:
            context.embeddings.weight[token] = torch.nan
            denoiser.embeddings.weight[token] = torch.nan
        else:
            context.norm_f.weight[3] = torch.nan
            denoiser.norm_f.weight[3] = torch.inf
    return context, denoiser


async def test_a_nan_ends_the_request_that_has_it_and_no_other() -> None:
    model = vendored("tt_moe")
    healthy = [_request(f"well {mode}", mode, 20, [5, 9, 30]) for mode in Mode]
    wanted = await asyncio.to_thread(decode_all, model.context, model.denoiser, healthy, together=False)
    spoken = {token for result in wanted for token in result.token_ids}
    sick = next(token for token in range(31, 128) if token not in spoken)
    context, denoiser = _sick(sick)
    ill = [_request(f"ill {mode}", mode, 20, [5, sick, 30]) for mode in Mode]
    async with pair_of(context, denoiser, SETTINGS) as pair:
        requests = [*ill, *healthy]
        results = await asyncio.gather(*(collect(pair, r) for r in requests), return_exceptions=True)
        await _all_free(pair)
    for request, failed in zip(ill, results, strict=False):
        assert isinstance(failed, NumericalError) and request.id in str(failed), request.id
    for request, result, alone in zip(healthy, results[len(ill) :], wanted, strict=True):
        assert isinstance(result, Decoded) and result.token_ids == alone.token_ids, request.id


async def test_a_nan_in_the_weights_ends_every_request() -> None:
    async with pair_of(*_sick(None), SETTINGS) as pair:
        for _ in range(2):
            requests = [_request(f"{mode} {n}", mode, 20, [5, n + 6]) for mode in Mode for n in range(2)]
            results = await asyncio.gather(*(collect(pair, r) for r in requests), return_exceptions=True)
            assert all(isinstance(result, NumericalError) for result in results), results
            await _all_free(pair)


async def test_an_engine_thread_that_dies_is_told_to_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "twotower")
    model = vendored("tt_dense")
    async with pair_of(model.context, model.denoiser, SETTINGS) as pair:
        tasks = [asyncio.create_task(collect(pair, _request(mode, mode, LONG))) for mode in Mode]
        await asyncio.sleep(0.05)

        def broken(*_: object) -> None:
            raise RuntimeError("device lost")

        monkeypatch.setattr(type(model.context), "logits", broken)
        started = time.monotonic()
        for task in tasks:
            with pytest.raises(Unavailable, match=r"the engine stopped \(RuntimeError\); its log says why"):
                await task
        assert time.monotonic() - started < 5
        with pytest.raises(Unavailable, match="the engine stopped"):
            await collect(pair, _request("later"))
        assert pair.failure is not None


@pytest.mark.parametrize(("mode", "temperature"), [(Mode.DIFFUSION, 1.0), (Mode.AR, 0.7), (Mode.MOCK_AR, 0.7)])
def test_the_seed_decides(mode: Mode, temperature: float) -> None:
    model = vendored("tt_dense")

    def request(name: str, seed: int) -> Request:
        params = DecodingParams(mode, 24, 8, 8, 0.5, temperature, seed=seed, ignore_eos=True)
        return Request(Id(name), (5, 6, 7), params)

    asked = [request("a", 1), request("b", 2), request("c", 1)]
    first, other, same = decode_all(model.context, model.denoiser, asked)
    assert first.token_ids == same.token_ids != other.token_ids


@pytest.mark.parametrize("alone", [False, True])
def test_both_engines_in_one_process_have_the_configured_patience(alone: bool) -> None:
    model, go_on = vendored("tt_moe"), threading.Event()
    settings = replace(SETTINGS, stall_timeout_s=0.05)
    runner = colocated_runner(model.context, None if alone else model.denoiser, settings)
    runner.engines[0].tick = lambda: go_on.wait(10)  # type: ignore[method-assign]
    try:
        with pytest.raises(Unavailable, match=r"in one tick for more than 0\.05 s"):
            for _ in range(300):
                runner.wake()
                time.sleep(0.01)
                runner.check()
    finally:
        go_on.set()
        runner.engines[0].tick = lambda: False  # type: ignore[method-assign]
        runner.stop()
