"""A tower's case: events leave from the engine's own thread, and a cell's event loop reads them in another process.

The engine works between events, half of the time with Python's lock and half without it, as one does that calls torch.
What an event costs it is what its ticks are longer than those of an engine that sends nothing.
"""

import asyncio
import contextlib
import hashlib
import socket
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any, Protocol

from benchmarks.transport_parts.seam import BEAT_S, Answer, Emit
from benchmarks.transport_parts.sides import Process
from benchmarks.transport_parts.variants import BASELINE, VARIANTS, Variant
from twotower.core import BlockEvent, Request, RequestId

_PARTS, _TURNS, _BUFFER = 8, 1500, b"x" * 80_000  # a millisecond or so, as long as a small model's step
_REQUEST_BYTES = 100  # no beat is as long, every request is longer
_IDS = tuple(range(200, 216))
_REQUEST = Request(RequestId("engine"), tuple(range(100, 140)))


@dataclass(frozen=True, slots=True)
class Ticks:
    """Of an engine's thread. Seconds an event, but for `ticks_s`."""

    ticks_s: list[float]
    sends_s: list[float]
    thread_cpu_s: float
    process_cpu_s: float


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Of the reader: seconds from before the send until the loop has the event, and CPU seconds an event."""

    late_s: list[float]
    cpu_s: float


class Sender(Protocol):
    """How the engine's thread sends. `send` is called by that thread only."""

    async def listen(self) -> str: ...

    def send(self, event: BlockEvent) -> None: ...


class Nothing:
    async def listen(self) -> str:
        return ""

    def send(self, event: BlockEvent) -> None:
        pass


class Socket:
    """A blocking socket that the engine's thread and the one that reads share; `beat` frames go out in between."""

    def __init__(self, greeting_bytes: int, frame_of: Callable[[BlockEvent], bytes], beat: bytes) -> None:
        self._greeting_bytes, self._frame_of, self._beat = greeting_bytes, frame_of, beat
        self._sending, self._connected = threading.Lock(), threading.Event()

    async def listen(self) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        return str(listener.getsockname()[1]) + (" " + bytes(32).hex() if self._greeting_bytes else "")

    def _serve(self, listener: socket.socket) -> None:
        self._socket, _ = listener.accept()
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        greeting = self._greeting_bytes + _REQUEST_BYTES
        while greeting > 0:
            greeting -= len(self._socket.recv(greeting))
        self._socket.settimeout(BEAT_S)
        self._connected.set()
        with contextlib.suppress(ConnectionError):
            while True:
                with contextlib.suppress(TimeoutError):
                    if not self._socket.recv(1 << 16):
                        return
                with self._sending:
                    self._socket.sendall(self._beat)

    def send(self, event: BlockEvent) -> None:
        frame = self._frame_of(event)
        self._connected.wait()
        with self._sending:
            self._socket.sendall(frame)


def _json_socket() -> Sender:
    from actors.frames import framed
    from benchmarks.transport_parts.streams import to_json_frame

    return Socket(32, lambda event: framed(to_json_frame(0, event)), b"")


def _framed_socket() -> Sender:
    from benchmarks.transport_parts.framed import framed
    from benchmarks.transport_parts.messages import Block

    return Socket(0, lambda event: framed([Block(0, event)]), framed([]))


class Loop:
    """The candidate's own server on this process's event loop; the engine's thread hands events over to it."""

    def __init__(self, variant: Variant) -> None:
        self._server, _ = variant.ends()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[BlockEvent] = asyncio.Queue()
        self._asked = threading.Event()

    async def listen(self) -> str:
        return await self._server.serve(self._answer, lambda reason: None, None)

    async def _answer(self, request: Request, emit: Emit) -> None:
        self._asked.set()
        while True:
            await emit(await self._events.get())

    def send(self, event: BlockEvent) -> None:
        self._asked.wait()
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class ZmqSocket:
    """A ROUTER that belongs to the engine's thread: ZeroMQ's sockets cannot be shared."""

    async def listen(self) -> str:
        import zmq

        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._peer = b""
        return f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"

    def send(self, event: BlockEvent) -> None:
        from benchmarks.transport_parts.messages import Block, encode

        if not self._peer:
            self._peer, _ = self._socket.recv_multipart()
        self._socket.send_multipart([self._peer, encode([Block(0, event)])])


@dataclass(frozen=True, slots=True)
class Way:
    """One way to send. `variant` names the reader's end, and what must be installed."""

    name: str
    variant: str
    sender: Callable[[], Sender]


def _by_loop(name: str) -> Way:
    return Way(f"{name}, by the process's loop", name, lambda: Loop(VARIANTS[name]))


NOTHING = "nothing is sent"
WAYS = {
    way.name: way
    for way in (
        Way(NOTHING, BASELINE, Nothing),
        Way(f"{BASELINE}, socket: today", BASELINE, _json_socket),
        Way("framed, socket", "framed", _framed_socket),
        _by_loop("framed"),
        _by_loop("grpc-stream"),
        _by_loop("grpc-calls"),
        Way("zmq, socket", "zmq", ZmqSocket),
    )
}


def measure(name: str, loop: str, ticks: int) -> tuple[Ticks, Arrivals | None]:
    """One way, in two new processes."""
    tower = Process(tower_main, loop, name)
    reader = None
    try:
        address = tower.told()
        if name == NOTHING:
            return tower.call("ticks", ticks), None
        reader = Process(reader_main, loop, WAYS[name].variant, address)
        for count in (ticks // 10, ticks):  # the first to warm up
            reader.tell("take", count)
            done = tower.call("ticks", count)
            arrived = reader.told()
        return done, arrived
    finally:
        tower.end()
        if reader is not None:
            reader.end()


async def tower_main(pipe: "Pipe[Any, Any]", name: str) -> None:
    sender = WAYS[name].sender()
    pipe.send(await sender.listen())
    while True:
        _, count = await asyncio.to_thread(pipe.recv)
        pipe.send(await asyncio.to_thread(_tick, sender, count))


def _tick(sender: Sender, count: int) -> Ticks:
    ticks_s, sends_s, thread_cpu_s, cpu = [], [], 0.0, time.process_time()
    sender_start = time.thread_time()
    for _ in range(count):
        started = time.perf_counter()
        _work()
        before, at = time.thread_time(), time.perf_counter()
        sender.send(BlockEvent(RequestId("engine"), time.monotonic_ns(), _IDS, 5, 1))
        done = time.perf_counter()
        thread_cpu_s += time.thread_time() - before
        ticks_s.append(done - started)
        sends_s.append(done - at)
    works_s = time.thread_time() - sender_start - thread_cpu_s
    time.sleep(0.05)  # what is still under way counts as well
    process_s = time.process_time() - cpu - works_s
    return Ticks(ticks_s, sends_s, thread_cpu_s / count, process_s / count)


def _work() -> None:
    for _ in range(_PARTS):
        total = 0
        for turn in range(_TURNS):
            total += turn
        hashlib.sha256(_BUFFER).digest()


async def reader_main(pipe: "Pipe[Any, Any]", variant: str, address: str) -> None:
    _, connect = VARIANTS[variant].ends()
    events: AsyncIterator[Answer] = (await connect(address, None)).ask(0, _REQUEST)
    while True:
        _, count = await asyncio.to_thread(pipe.recv)
        cpu, late_s = time.process_time(), []
        for _ in range(count):
            event = await anext(events)
            assert isinstance(event, BlockEvent)
            late_s.append((time.monotonic_ns() - event.start) / 1e9)
        pipe.send(Arrivals(late_s, (time.process_time() - cpu) / count))


def longer_s(ticks: Ticks, nothing: Ticks) -> float:
    """How much longer the middle tick is than one without an event."""
    return statistics.median(ticks.ticks_s) - statistics.median(nothing.ticks_s)
