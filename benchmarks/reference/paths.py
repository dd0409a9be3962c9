"""The ways a request can be served, behind one face: the naive loop, a pair in this process, a service over gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.reference.naive_loop import NaiveLoop
from twotower.core import Floor, Mode, Request
from twotower.decoding.stopping import Stopping
from twotower.engine.in_process import pair_of
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings
from twotower.model.tower import ContextTower, DenoiserTower

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
    """`GenerateStream` of a service that is already up."""

    name = "served"

    def __init__(self, address: str) -> None:
        self._address = address

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Running]:
        import grpc.aio

        async with grpc.aio.insecure_channel(self._address) as channel:
            yield _GrpcPath(channel)


class _GrpcPath:
    def __init__(self, channel: "grpc.aio.Channel") -> None:  # type: ignore[name-defined]  # noqa: F821
        from twotower.pb.twotower.v1.generation_pb2_grpc import GenerationServiceStub

        self._stub = GenerationServiceStub(channel)

    async def generate(self, request: Request) -> AsyncIterator[Piece]:
        async for answer in self._stub.GenerateStream(_message(request), timeout=TIMEOUT_S):
            if answer.WhichOneof("event") == "block":
                block = answer.block
                yield Piece(tuple(block.token_ids), block.num_steps, block.num_blocks)


def _message(request: Request) -> object:
    from twotower.pb.twotower.v1 import generation_pb2 as pb

    params = request.params
    message = pb.GenerateRequest(
        request_id=request.id,
        token_ids=pb.TokenIds(ids=request.prompt_token_ids),
        params=pb.DecodingParams(
            mode=f"MODE_{params.mode.name}",
            max_new_tokens=params.max_new_tokens,
            temperature=params.temperature,
            seed=params.seed,
            ignore_eos=params.ignore_eos,
            floor=f"FLOOR_{params.floor.name if params.mode is Mode.AUTO else 'UNSPECIFIED'}",
        ),
    )
    if params.mode is Mode.DIFFUSION:
        message.params.block_size = params.block_size
        message.params.steps_per_block = params.steps_per_block
        message.params.confidence_threshold = params.confidence_threshold
    elif params.mode in (Mode.VERIFIED, Mode.AUTO):
        message.params.block_size = params.block_size
        message.params.draft_steps = params.draft_steps
        message.params.draft_threshold = params.draft_threshold
    if params.mode is Mode.AUTO and params.floor is Floor.CONFIDENCE:
        message.params.confidence_threshold = params.confidence_threshold
    return message
