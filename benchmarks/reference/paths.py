"""The ways a request can be served, behind one face: the naive loop, a pair in this process, a service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.reference.naive_loop import NaiveLoop
from twotower.core import DecodingParams, Floor, Mode, Request
from twotower.decoding.stopping import Stopping
from twotower.engine.in_process import pair_of
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings
from twotower.model.tower import ContextTower, DenoiserTower
from twotower_client import AsyncClient, Block, RetryPolicy
from twotower_client.asking import Params

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that came together, and the denoiser steps and the blocks behind them, which in `verified` are rounds."""

    token_ids: tuple[int, ...]
    num_steps: int
    num_blocks: int = 0


class Running(Protocol):
    """A path that is up."""

    def generate(self, request: Request) -> AsyncIterator[Piece]:
        """The answer, cut after the first stop token on every path alike."""
        ...


class Path(Protocol):
    """A path that can be brought up for one measurement."""

    name: str

    def open(self) -> AbstractAsyncContextManager[Running]: ...


class NaivePath:
    """Requests are served one after the other, in the order they come, however many wait."""

    name = "naive"

    def __init__(self, context: ContextTower, denoiser: DenoiserTower, threads: int) -> None:
        self._loop, self._threads = NaiveLoop(context, denoiser), threads
        self._eos = context.config.eos_token_id
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Running]:
        torch.set_num_threads(self._threads)
        yield self

    async def generate(self, request: Request) -> AsyncIterator[Piece]:
        async with self._turn:
            await asyncio.sleep(0)  # whoever else asks at this moment shall have asked before the work begins
            generated, stopping = 0, Stopping(request.params, self._eos)
            for block in self._loop.generate(request):
                # The released code returns whole blocks; what lies behind the stop counts for nobody.
                kept, _ = stopping.cut(block.token_ids, generated)
                generated += len(kept)
                yield Piece(kept, block.num_steps)


class InProcessPath:
    """`twotower.engine.in_process`: both towers on one thread, local exchange. `pair_of` is `open_pair` on loaded
    towers, so every path that runs here has the same weights in the same memory."""

    def __init__(
        self,
        context: ContextTower,
        denoiser: DenoiserTower,
        settings: EngineSettings,
        threads: int,
        name: str = "in_process",
    ) -> None:
        self._context, self._denoiser = context, denoiser
        self._settings, self._threads, self.name = settings, threads, name

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Running]:
        torch.set_num_threads(self._threads)
        async with pair_of(self._context, self._denoiser, self._settings, prepare=True) as pair:
            yield PairPath(pair)


class PairPath:
    """A pair that is up."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair

    async def generate(self, request: Request) -> AsyncIterator[Piece]:
        async for event in self._pair.generate(request, TIMEOUT_S):
            yield Piece(event.token_ids, event.num_steps, event.num_blocks)


class ServedPath:
    """A service that is already up, asked by our client over one of its faces. What fails is not asked again."""

    name = "served"

    def __init__(self, address: str, face: str = "grpc") -> None:
        """`face`: grpc or http."""
        self._url = f"{face}://{address}"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Running]:
        async with AsyncClient(self._url, retry=RetryPolicy(attempts=1), timeout_s=TIMEOUT_S) as client:
            yield _Asked(client)


class _Asked:
    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def generate(self, request: Request) -> AsyncIterator[Piece]:
        async with self._client.stream(
            request.prompt_token_ids, request_id=request.id, **_options(request.params)
        ) as events:
            async for event in events:
                if isinstance(event, Block):
                    yield Piece(event.token_ids, event.usage.num_steps, event.usage.num_blocks)


def _options(params: DecodingParams) -> Params:
    """Those that a mode has; a service refuses others."""
    asked = Params(
        mode=params.mode.value,
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        seed=params.seed,
        ignore_eos=params.ignore_eos,
    )
    if params.mode is Mode.DIFFUSION:
        asked |= {"block_size": params.block_size, "steps_per_block": params.steps_per_block}
    elif params.mode in (Mode.VERIFIED, Mode.AUTO):
        asked |= {"block_size": params.block_size, "draft_steps": params.draft_steps}
        asked |= {"draft_threshold": params.draft_threshold}
    if params.mode is Mode.AUTO:
        asked |= {"floor": params.floor.value}
    if params.mode is Mode.DIFFUSION or (params.mode is Mode.AUTO and params.floor is Floor.CONFIDENCE):
        asked |= {"confidence_threshold": params.confidence_threshold}
    return asked
