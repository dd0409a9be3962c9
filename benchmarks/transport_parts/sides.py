"""The two processes of a candidate: a cell that answers without computing, and a router that asks. Commands by pipe."""

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.transport_parts.seam import Answer, Asker, Emit, Gone, Secrets
from benchmarks.transport_parts.variants import VARIANTS
from twotower.core import BlockEvent, ReleasedEvent, Request, RequestId

BLOCKS = 4
EVENTS = BLOCKS + 1  # the end is one too
FLOOD = 100_000
_PROMPT = tuple(range(100, 140))
_IDS = tuple(range(200, 216))
_READY_S = 60.0

ANSWER, HOLD, HANG, SPILL = "answer", "hold", "hang", "spill"  # what a cell does with a run; a request's id begins so


@dataclass(frozen=True, slots=True)
class Load:
    """What a router saw while its clients asked. Seconds."""

    runs: int
    wall_s: float
    cpu_s: float
    first_s: list[float]


@dataclass(frozen=True, slots=True)
class Notice:
    """When (`time.monotonic`) somebody was told that the other side is gone, and in what words."""

    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class Slow:
    """A run nobody read: what the cell's loop could emit, what other runs felt, how it ended."""

    other_s: float
    ending: str


class Process:
    """A side in a process of its own, and commands to it."""

    def __init__(self, main: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_enter, args=(theirs, main, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def tell(self, *command: Any) -> None:
        self._pipe.send(command)

    def told(self, timeout_s: float = _READY_S) -> Any:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"no answer from process {self.pid} within {timeout_s:g} s")
        return self._pipe.recv()

    def says_within(self, timeout_s: float) -> bool:
        return self._pipe.poll(timeout_s)

    def call(self, *command: Any) -> Any:
        self.tell(*command)
        return self.told()

    def end(self) -> None:
        self._process.kill()
        self._process.join(10)


@contextlib.contextmanager
def both(name: str, loop: str, secrets: Secrets | None) -> Iterator[tuple[Process, Process]]:
    """A cell and a router that is connected to it."""
    cell = Process(cell_main, loop, name, secrets)
    try:
        router = Process(router_main, loop, name, secrets, cell.told())
        try:
            router.told()
            yield cell, router
        finally:
            router.end()
    finally:
        cell.end()


def _enter(
    pipe: "Connection[Any, Any]", main: Callable[..., Coroutine[Any, Any, None]], loop: str, *arguments: Any
) -> None:
    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner, contextlib.suppress(EOFError, KeyboardInterrupt):
        runner.run(main(pipe, *arguments))
    os._exit(0)  # no library's threads are waited for


class CellDesk:
    """What the cell does with runs, and how much it could emit of a flood."""

    def __init__(self) -> None:
        self.emitted = 0
        self.lost: asyncio.Future[Notice] = asyncio.get_running_loop().create_future()

    def on_lost(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(Notice(time.monotonic(), reason))

    async def answer(self, request: Request, emit: Emit) -> None:
        kind = request.id.partition("-")[0]
        blocks = {ANSWER: BLOCKS, SPILL: FLOOD}.get(kind, 1)
        for block in range(blocks):
            await emit(BlockEvent(request.id, 16 * block, _IDS, 5, 1))
            self.emitted += kind == SPILL
            await asyncio.sleep(0)  # other runs' events come in between, as from an engine's tick
        if kind == HANG:
            await asyncio.sleep(0.2)
            time.sleep(60)  # the loop hangs; the process's other threads do not
        if kind == HOLD:
            await asyncio.sleep(60)
        await emit(ReleasedEvent(request.id))


async def cell_main(pipe: "Connection[Any, Any]", name: str, secrets: Secrets | None) -> None:
    server, _ = VARIANTS[name].ends()
    desk = CellDesk()
    pipe.send(await server.serve(desk.answer, desk.on_lost, secrets))
    while True:
        match await asyncio.to_thread(pipe.recv):
            case ["cpu"]:
                pipe.send(time.process_time())
            case ["emitted"]:
                pipe.send(desk.emitted)
            case ["wait for loss"]:
                pipe.send(await desk.lost)


async def router_main(pipe: "Connection[Any, Any]", name: str, secrets: Secrets | None, address: str) -> None:
    _, connect = VARIANTS[name].ends()
    router = RouterDesk(await connect(address, secrets))
    await router.load(1, 0.1)
    pipe.send("ready")
    while True:
        match await asyncio.to_thread(pipe.recv):
            case ["load", clients, seconds]:
                pipe.send(await router.load(clients, seconds))
            case ["open", kind]:
                pipe.send(await router.open(kind))
            case ["wait for loss"]:
                pipe.send(await router.loss())
            case ["slow", seconds]:
                pipe.send(await router.slow(seconds))


class RouterDesk:
    """Asks; at most one run is `open` beside those of a load."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._numbers = count()
        self._open: AsyncIterator[Answer]

    def _ask(self, kind: str) -> AsyncIterator[Answer]:
        number = next(self._numbers)
        return self._asker.ask(number, Request(RequestId(f"{kind}-{number:08}"), _PROMPT))

    async def load(self, clients: int, seconds: float) -> Load:
        first_s: list[float] = []
        started, cpu = time.perf_counter(), time.process_time()
        end = started + seconds

        async def client() -> None:
            while (asked := time.perf_counter()) < end:
                tokens, first = 0, True
                async for event in self._ask(ANSWER):
                    if first:
                        first_s.append(time.perf_counter() - asked)
                        first = False
                    if isinstance(event, BlockEvent):
                        tokens += len(event.token_ids)
                assert tokens == BLOCKS * len(_IDS), f"got {tokens} tokens, wanted {BLOCKS * len(_IDS)}"

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        return Load(len(first_s), time.perf_counter() - started, time.process_time() - cpu, first_s)

    async def open(self, kind: str) -> str:
        self._open = self._ask(kind)
        await anext(self._open)
        return "opened"

    async def loss(self) -> Notice:
        """Reads the open run until it is told that nothing follows."""
        try:
            async for _ in self._open:
                pass
        except Gone as gone:
            return Notice(time.monotonic(), str(gone))
        return Notice(time.monotonic(), "the run ended as if all were well")

    async def slow(self, seconds: float) -> Slow:
        """A run that floods and is not read; meanwhile others are asked."""
        await self.open(SPILL)
        await asyncio.sleep(0.5)
        started = time.perf_counter()
        async for _ in self._ask(ANSWER):
            pass
        other_s = time.perf_counter() - started
        await asyncio.sleep(seconds)
        try:
            async with asyncio.timeout(1.0):
                async for _ in self._open:
                    pass
        except Gone as gone:
            return Slow(other_s, f"ended: {gone}")
        except TimeoutError:
            pass
        return Slow(other_s, "kept, and read on")
