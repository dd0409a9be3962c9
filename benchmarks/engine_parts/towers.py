"""Two tower processes without Ray: the actors' own classes, line, link and settings, called over a pipe.

These are the parts of a cell of `split` placement, but for Ray. Ray starts, stops and supervises them. It is not on the
way of requests and events. Each process also answers for its recorder and for bare passes.
"""

import asyncio
import gc
import itertools
import multiprocessing
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from actors.remote import RemoteEngine
from actors.settings import CellSettings
from actors.towers import ContextProcess, DenoiserProcess, TowerProcess
from benchmarks.engine_parts.bare import Bench, PassTime
from benchmarks.engine_parts.recorder import Recorder, Recording
from twotower.engine.ledger import Ledger
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings
from twotower.exchange.protocol import Port
from twotower.model.room import Room

_START_S, _STOP_S = 120.0, 5.0


class _Watched(TowerProcess):
    """What the benchmark asks of a tower process beside its work."""

    def __init__(self, settings: CellSettings, threads: int) -> None:
        super().__init__(settings)
        self.recorder = Recorder()
        self._threads = threads

    def _load(self) -> None:
        torch.set_num_threads(self._threads)
        super()._load()

    async def record(self, on: bool) -> Recording:
        return self.recorder.switch(on)

    async def cpu_s(self) -> float:
        """CPU seconds of the whole process."""
        return time.process_time()

    async def prepare_bench(self, prompts: Sequence[Sequence[int]], cached: int) -> None:
        self._bench = Bench(self._own_tower(), prompts, cached, self.settings.engine.capture)

    async def time_pass(
        self, kind: str, rows: int, decide: bool, eager: bool, pause_s: float, seconds: float
    ) -> PassTime:
        return self._bench.time(kind, rows, decide, eager, pause_s, seconds)

    async def tensor_bytes(self) -> int:
        """Bytes of all tensors alive in this process, each storage once."""
        gc.collect()
        storages = {
            (storage := thing.untyped_storage()).data_ptr(): storage.nbytes()
            for thing in gc.get_objects()
            if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta"
        }
        return sum(storages.values())

    def _own_tower(self) -> Any:
        raise NotImplementedError


class WatchedContext(_Watched, ContextProcess):
    """The context tower's process."""

    def _load(self) -> None:
        super()._load()
        self.recorder.attach(self._engine, self.runner)
        connect = self._engine.connect

        def watched(port: Port) -> None:
            self.recorder.attach_port(port)
            connect(port)

        self._engine.connect = watched  # type: ignore[method-assign]

    async def read_bench(self) -> list[list[Any]]:
        return self._bench.read()

    def _own_tower(self) -> Any:
        return self._engine.tower


class WatchedDenoiser(_Watched, DenoiserProcess):
    """The denoiser tower's process."""

    def _connect(self, address: Any) -> None:
        super()._connect(address)
        self.recorder.attach(self.runner.engines[0], self.runner)  # type: ignore[arg-type]

    async def mirror_bench(self, contents: list[list[Any]]) -> None:
        self._bench.mirror(contents)

    def _own_tower(self) -> Any:
        return self._tower


def _main(pipe: "Connection[Any, Any]", kind: type[_Watched], settings: CellSettings, threads: int) -> None:
    """A tower process."""
    torch.set_num_threads(threads)
    process = kind(settings, threads)
    with suppress(EOFError, KeyboardInterrupt):
        asyncio.run(_answer(pipe, process))
    process.runner.stop(_STOP_S)


async def _answer(pipe: "Connection[Any, Any]", process: _Watched) -> None:
    """Answers calls until the pipe says stop or breaks. Its loop runs between the calls, too: the line to the client
    lives on it."""
    while (call := await asyncio.to_thread(pipe.recv)) is not None:
        method, args = call
        try:
            answer = await getattr(process, method)(*args)
        except Exception as error:
            answer = error
        pipe.send(answer)


class _Method:
    """One method of the process, called as Ray's actors are."""

    def __init__(self, call: Any) -> None:
        self.remote = call


class _Actor:
    """A tower process with the face of an actor handle: `actor.method.remote(…)` gives something to await, and so does
    a host's `actor.call.remote(method, …)`."""

    def __init__(self, kind: type[_Watched], settings: CellSettings, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, far_end = spawn.Pipe()
        self._turn = threading.Lock()
        self.process: BaseProcess = spawn.Process(target=_main, args=(far_end, kind, settings, threads), daemon=True)
        self.process.start()
        far_end.close()

    @property
    def call(self) -> _Method:
        return _Method(self._call)

    def __getattr__(self, method: str) -> _Method:
        return _Method(partial(self._call, method))

    async def _call(self, method: str, *args: object) -> Any:
        return await asyncio.to_thread(self._ask, method, args)

    def _ask(self, method: str, args: Sequence[object]) -> Any:
        with self._turn:
            self._pipe.send((method, args))
            answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        with self._turn, suppress(OSError):
            self._pipe.send(None)
        self.process.join(2 * _STOP_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@dataclass(frozen=True)
class SplitPair:
    """A running pair of tower processes; `pair` decodes, the rest is for whoever measures."""

    pair: Pair
    context: Any
    denoiser: Any

    @property
    def pids(self) -> dict[str, int]:
        return {"context": self.context.process.pid, "denoiser": self.denoiser.process.pid}

    async def cpu_s(self) -> dict[str, float]:
        """CPU seconds of each process so far, this one's under `client`."""
        towers = {"context": await self.context.cpu_s.remote(), "denoiser": await self.denoiser.cpu_s.remote()}
        return {"client": time.process_time(), **towers}

    async def record(self, on: bool) -> dict[str, Recording]:
        """Switch both recorders; what they saw until now."""
        return {"context": await self.context.record.remote(on), "denoiser": await self.denoiser.record.remote(on)}


_links = itertools.count()


@asynccontextmanager
async def split_pair(checkpoint: str, engine: EngineSettings, threads: int = 1) -> AsyncIterator[SplitPair]:
    """Start both processes with `threads` compute threads each, join them, end them when the block is left."""
    settings = CellSettings(checkpoint, device="cpu", placement="split", engine=engine)
    context, denoiser = (_Actor(kind, settings, threads) for kind in (WatchedContext, WatchedDenoiser))
    engines = [RemoteEngine(context, "context tower", _START_S), RemoteEngine(denoiser, "denoiser tower", _START_S)]
    try:
        await asyncio.gather(*(e.call("load", timeout_s=_START_S) for e in engines))
        address = await context.open_link.remote(next(_links), 1)
        await denoiser.connect.remote(address)
        await asyncio.gather(*(e.open_line() for e in engines))
        rooms = [Room(engine.max_sequences, engine.pages) for _ in engines]
        ledger = Ledger(rooms[0], rooms[1:], engine.max_queued_requests, stride=engine.prefix_stride)
        async with Pair(engines[0], engines[1:], ledger) as pair:
            yield SplitPair(pair, context, denoiser)
        for each in engines:
            each.close_line()
    finally:
        denoiser.end()  # first: a link that its own side closes is no error
        context.end()
