"""The ways in which a cell's engines can be put together, each decoding a list of requests in company.

`alone` is what they are all compared with: one request at a time, both engines by hand.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.engine.decode import Decoded, collect
from twotower.config import ModelConfig
from twotower.core import BlockEvent, Event, FailureEvent, Mode, ReleasedEvent, Request, RequestId
from twotower.engine.context.compiling import Compiling
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.in_process import grammars_of, pair_of
from twotower.engine.ledger import Ledger
from twotower.engine.pair import Pair
from twotower.engine.runner import EngineRunner
from twotower.engine.settings import EngineSettings
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.local import LocalExchange
from twotower.exchange.settings import EngineHooks, LinkSettings
from twotower.model.cache import TowerCache
from twotower.model.pages import page_tokens_on
from twotower.model.room import Room
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.model.transfer import current

SETTINGS = EngineSettings(max_sequences=12, max_sequence_length=192, prefill_chunk_tokens=64, max_queued_requests=512)
LINK = LinkSettings(link_timeout_s=20, setup_timeout_s=20, staging_bytes=1 << 18)
MAX_TICKS = 50_000
MAX_DELAY_S = 0.03


@dataclass(frozen=True)
class Towers:
    """A loaded checkpoint."""

    name: str
    context: ContextTower
    denoiser: DenoiserTower

    @property
    def config(self) -> ModelConfig:
        return self.context.config


@dataclass
class ByHand:
    """One context engine and some denoiser engines over local exchanges, ticked in an order drawn at random.

    On one thread: a local exchange has one cache for both towers, so its engines take turns.
    """

    towers: Towers
    num_denoisers: int = 1
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context = ContextEngine(self.towers.context, SETTINGS, self.events.append)
        self.denoisers = []
        for _ in range(self.num_denoisers):
            exchange = LocalExchange(self.context.cache, lambda: None)
            self.context.connect(exchange.port)
            self.denoisers.append(DenoiserEngine(self.towers.denoiser, exchange.link, SETTINGS, self.events.append))

    def decode(self, requests: Sequence[Request], draw: random.Random) -> dict[RequestId, Decoded]:
        """Requests arrive at random ticks, as many at once as there are slots."""
        waiting, results = list(requests), {request.id: Decoded(list(request.committed)) for request in requests}
        eagerness, open_ = draw.choice([0.05, 0.3, 1.0]), 0
        with torch.inference_mode():
            for _ in range(MAX_TICKS):
                while waiting and open_ < SETTINGS.max_sequences and draw.random() < eagerness:
                    request = waiting.pop()
                    open_ += 1
                    self._engine(request, draw).add(request)
                draw.choice([self.context, *self.denoisers]).tick()
                open_ -= self._take(results)
                if not waiting and not open_:
                    return results
        raise AssertionError("the engines do not come to an end")

    def _engine(self, request: Request, draw: random.Random) -> ContextEngine | DenoiserEngine:
        return self.context if request.params.mode is Mode.AR else draw.choice(self.denoisers)

    def _take(self, results: dict[RequestId, Decoded]) -> int:
        """How many requests are released by the events so far."""
        released = 0
        for event in self.events:
            assert not isinstance(event, FailureEvent), event
            if isinstance(event, BlockEvent):
                results[event.request_id].add(event)
            else:
                released += isinstance(event, ReleasedEvent)
        self.events.clear()
        return released


def alone(towers: Towers, requests: Sequence[Request]) -> dict[RequestId, Decoded]:
    """Each request with a pair to itself."""
    pair, draw, results = ByHand(towers), random.Random(0), {}
    for request in requests:
        results |= pair.decode([request], draw)
    return results


def in_turns(towers: Towers, requests: Sequence[Request], draw: random.Random) -> dict[RequestId, Decoded]:
    return ByHand(towers, draw.choice([1, 2, 3])).decode(requests, draw)


def colocated(towers: Towers, requests: Sequence[Request], draw: random.Random) -> dict[RequestId, Decoded]:
    async def run() -> dict[RequestId, Decoded]:
        async with pair_of(towers.context, towers.denoiser, SETTINGS) as pair:
            return await _in_company(pair, requests, draw)

    return asyncio.run(run())


def split(towers: Towers, requests: Sequence[Request], draw: random.Random) -> dict[RequestId, Decoded]:
    async def run() -> dict[RequestId, Decoded]:
        async with split_pair(towers, draw.choice([1, 2, 3])) as pair:
            return await _in_company(pair, requests, draw)

    return asyncio.run(run())


async def _in_company(pair: Pair, requests: Sequence[Request], draw: random.Random) -> dict[RequestId, Decoded]:
    """All requests through a pair, each a random time after the start."""
    delays = [draw.uniform(0, MAX_DELAY_S * draw.choice([0, 1, 5])) for _ in requests]

    async def late(request: Request, delay_s: float) -> Decoded:
        await asyncio.sleep(delay_s)
        return await collect(pair, request)

    results = await asyncio.gather(*map(late, requests, delays))
    return {request.id: result for request, result in zip(requests, results, strict=True)}


@asynccontextmanager
async def split_pair(
    towers: Towers,
    num_denoisers: int,
    settings: EngineSettings = SETTINGS,
    told: LinkSettings = LINK,
    checkpoint: Path | None = None,
) -> AsyncIterator[Pair]:
    """Engines on threads of their own, each denoiser with a mirror, joined by gloo."""
    runners = [EngineRunner() for _ in range(1 + num_denoisers)]
    grammars = grammars_of(checkpoint, towers.config)
    context = ContextEngine(towers.context, settings, runners[0].emit, Compiling(grammars, runners[0].wake))
    runners[0].start([context], towers.context.device)
    page_tokens = page_tokens_on(towers.context.device.type)
    pages, stride = settings.pages_of(page_tokens), settings.prefix_stride_of(page_tokens)
    for number, runner in enumerate(runners[1:]):
        port, address = open_port(context.cache, number, 0, told, hooks_of(runners[0]))
        context.connect(port)
        tower = towers.denoiser
        with current(tower.device):
            mirror = TowerCache(tower.config, settings.max_sequences, pages, tower.device, tower.dtype)
            link = await asyncio.to_thread(connect, address, mirror, hooks_of(runner))
            compiling = Compiling(grammars, runner.wake)
            runner.start([DenoiserEngine(tower, link, settings, runner.emit, compiling=compiling)], tower.device)
    rooms = [Room(settings.max_sequences, pages, page_tokens=page_tokens) for _ in runners]
    try:
        ledger = Ledger(rooms[0], rooms[1:], settings.max_queued_requests, stride=stride)
        async with Pair(runners[0], runners[1:], ledger) as pair:
            yield pair
    finally:
        for runner in reversed(runners):
            await asyncio.to_thread(runner.stop)


def hooks_of(runner: EngineRunner) -> EngineHooks:
    return EngineHooks(runner.progress, runner.wake)


ARRANGEMENTS = {"in turns": in_turns, "colocated": colocated, "split": split}
