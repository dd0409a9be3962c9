"""What a pair of real engines promises: room given back at once, sick towers, dying threads, seeds."""

import asyncio
import copy
import logging
import threading
import time
from dataclasses import replace

import pytest
import torch

from tests.engine.decode import SETTINGS, Decoded, collect, decode_all, plain_request
from tests.goldens import vendored
from twotower.core import BlockEvent, DecodingParams, Event, FinishReason, Mode, ReleasedEvent, Request
from twotower.core import RequestId as Id
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.in_process import colocated_runner, pair_of
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings
from twotower.errors import (
    DeadlineExceeded,
    NumericalError,
    Unavailable,
)
from twotower.exchange.local import LocalExchange
from twotower.model.tower import ContextTower, DenoiserTower

LONG = 200
MODES = pytest.mark.parametrize("mode", list(Mode))


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
        return self.context.cache.room.free_slots, self.context.cache.room.free_pages

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
    other = plain_request("other", Mode.DIFFUSION, new=LONG)
    engine.add(plain_request("a", mode, LONG))
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
        async for _ in pair.generate(plain_request("a", mode, LONG)):
            break
        await _all_free(pair)


@MODES
async def test_a_deadline_frees_the_sequence(mode: Mode) -> None:
    model = vendored("tt_dense")
    async with pair_of(model.context, model.denoiser, SETTINGS) as pair:
        with pytest.raises(DeadlineExceeded):
            async for _ in pair.generate(plain_request("a", mode, LONG), 0.03):
                pass
        await _all_free(pair)
        assert (await collect(pair, plain_request("a", mode, 4))).finish_reason is FinishReason.LENGTH


async def _all_free(pair: Pair) -> None:
    deadline = time.monotonic() + 10
    while pair.ledger.running and time.monotonic() < deadline:
        await asyncio.sleep(0.001)
    assert pair.ledger.running == 0
    assert (pair.ledger.context.free_slots, pair.ledger.context.free_pages) == (SETTINGS.max_sequences, SETTINGS.pages)
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
    healthy = [plain_request(f"well {mode}", mode, 20, [5, 9, 30]) for mode in Mode]
    wanted = await asyncio.to_thread(decode_all, model.context, model.denoiser, healthy, together=False)
    spoken = {token for result in wanted for token in result.token_ids}
    sick = next(token for token in range(31, 128) if token not in spoken)
    context, denoiser = _sick(sick)
    ill = [plain_request(f"ill {mode}", mode, 20, [5, sick, 30]) for mode in Mode]
    async with pair_of(context, denoiser, SETTINGS) as pair:
        requests = [*ill, *healthy]
        results = await asyncio.gather(*(collect(pair, r) for r in requests), return_exceptions=True)
        await _all_free(pair)
    for request, failed in zip(ill, results, strict=False):
        assert isinstance(failed, NumericalError) and request.id in str(failed), request.id
    for request, result, alone in zip(healthy, results[len(ill) :], wanted, strict=True):
        assert isinstance(result, Decoded) and result.token_ids == alone.token_ids, request.id


async def test_a_nan_in_the_weights_ends_everyplain_request() -> None:
    async with pair_of(*_sick(None), SETTINGS) as pair:
        for _ in range(2):
            requests = [plain_request(f"{mode} {n}", mode, 20, [5, n + 6]) for mode in Mode for n in range(2)]
            results = await asyncio.gather(*(collect(pair, r) for r in requests), return_exceptions=True)
            assert all(isinstance(result, NumericalError) for result in results), results
            await _all_free(pair)


@pytest.mark.slow
async def test_an_engine_thread_that_dies_is_told_to_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "twotower")
    model = vendored("tt_dense")
    async with pair_of(model.context, model.denoiser, SETTINGS) as pair:
        tasks = [asyncio.create_task(collect(pair, plain_request(mode, mode, LONG))) for mode in Mode]
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
            await collect(pair, plain_request("later"))
        assert pair.failure is not None


@pytest.mark.parametrize(
    ("mode", "temperature"), [(Mode.DIFFUSION, 1.0), (Mode.AR, 0.7), (Mode.MOCK_AR, 0.7), (Mode.VERIFIED, 0.7)]
)
def test_the_seed_decides(mode: Mode, temperature: float) -> None:
    model = vendored("tt_dense")

    def request(name: str, seed: int) -> Request:
        params = DecodingParams(mode, 24, 8, 8, 0.5, temperature=temperature, seed=seed, ignore_eos=True)
        return Request(Id(name), (5, 6, 7), params)

    asked = [request("a", 1), request("b", 2), request("c", 1)]
    first, other, same = decode_all(model.context, model.denoiser, asked)
    assert first.token_ids == same.token_ids != other.token_ids


@pytest.mark.parametrize("alone", [False, True])
def test_both_engines_in_one_process_have_the_configured_patience(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, go_on = vendored("tt_moe"), threading.Event()
    settings = replace(SETTINGS, stall_timeout_s=0.05)
    runner = colocated_runner(model.context, None if alone else model.denoiser, settings)
    monkeypatch.setattr(runner.engines[0], "tick", lambda: go_on.wait(10))
    try:
        with pytest.raises(Unavailable, match=r"in one tick for more than 0\.05 s"):
            for _ in range(300):
                runner.wake()
                time.sleep(0.01)
                runner.check()
    finally:
        go_on.set()
        monkeypatch.undo()
        runner.stop()
