"""The towers' case: two engines' threads that answer each other, as a commit and its delta do. Heads without tensors.

A thread (or the process's event loop) receives and wakes the engine's thread; the engine's thread sends.
"""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any, Protocol

from benchmarks.transport_parts.sides import Process
from twotower.core import BlockEvent, RequestId
from twotower.exchange.control import Listener, dial
from twotower.wire import Codec, from_json, to_json

_EVENT = BlockEvent(RequestId("sequence-00000001"), 32, tuple(range(200, 216)), 5, 1)
_LENGTH = struct.Struct("!I")
_S = 10.0


@dataclass(frozen=True, slots=True)
class Trips:
    """Seconds of each round trip, and CPU seconds of one end a trip."""

    trips_s: list[float]
    cpu_s: float


class Channel(Protocol):
    def send(self, frame: bytes) -> None: ...

    def receive(self) -> bytes: ...


class Plain:
    """A length and bytes on a blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._received = sock, bytearray()

    def send(self, frame: bytes) -> None:
        self._socket.sendall(_LENGTH.pack(len(frame)) + frame)

    def receive(self) -> bytes:
        while len(self._received) < _LENGTH.size or len(self._received) < self._end():
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._received += data
        end = self._end()
        frame = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return frame

    def _end(self) -> int:
        return _LENGTH.size + int(_LENGTH.unpack_from(self._received)[0])


class Engine:
    """What an engine's thread holds: `post`, and `wait` for what the other one posted."""

    def __init__(self) -> None:
        self._woken = threading.Event()
        self._got = _EVENT
        self.post: Callable[[BlockEvent], object]

    def take(self, event: BlockEvent) -> None:
        self._got = event
        self._woken.set()

    def wait(self) -> BlockEvent:
        if not self._woken.wait(_S):
            raise TimeoutError("no answer")
        self._woken.clear()
        return self._got


def _threaded(engine: Engine, channel: Channel, as_json: bool) -> None:
    if as_json:
        codec: Codec[BlockEvent] = Codec(BlockEvent)

        def encode(event: BlockEvent) -> bytes:
            return to_json([0, codec.plain(event)])

        def decode(frame: bytes) -> BlockEvent:
            return codec.message(from_json(frame)[1])
    else:
        from benchmarks.transport_parts import messages as m

        def encode(event: BlockEvent) -> bytes:
            return m.encode([m.Block(0, event)])

        def decode(frame: bytes) -> BlockEvent:
            [message] = m.decode_all(frame)
            assert isinstance(message, m.Block)
            return message.event

    def receive() -> None:
        try:
            while True:
                engine.take(decode(channel.receive()))
        except (OSError, EOFError):
            pass

    engine.post = lambda event: channel.send(encode(event))
    threading.Thread(target=receive, daemon=True).start()


async def _today(engine: Engine, address: str, listening: Callable[[str], None]) -> None:
    if address:
        port, key = address.split()
        _threaded(engine, dial("127.0.0.1", int(port), bytes.fromhex(key), _S), as_json=True)
        return
    listener = Listener("127.0.0.1")
    listening(f"{listener.port} {listener.authkey.hex()}")
    _threaded(engine, await asyncio.to_thread(listener.accept, time.monotonic() + _S), as_json=True)


async def _socket(engine: Engine, address: str, listening: Callable[[str], None]) -> None:
    if address:
        sock = socket.create_connection(("127.0.0.1", int(address)))
    else:
        listener = socket.create_server(("127.0.0.1", 0))
        listening(str(listener.getsockname()[1]))
        sock, _ = await asyncio.to_thread(listener.accept)
    _threaded(engine, Plain(sock), as_json=False)


async def _by_loop(engine: Engine, address: str, listening: Callable[[str], None]) -> None:
    from benchmarks.transport_parts.framed import Connection
    from benchmarks.transport_parts.messages import Block, Message

    loop = asyncio.get_running_loop()
    made: asyncio.Future[None] = loop.create_future()

    def take(message: Message) -> None:
        assert isinstance(message, Block)
        engine.take(message.event)

    def connection() -> Connection:
        end = Connection(take, lambda reason: None)
        engine.post = lambda event: loop.call_soon_threadsafe(end.post, Block(0, event))
        made.set_result(None)
        return end

    if address:
        await loop.create_connection(connection, "127.0.0.1", int(address))
    else:
        server = await loop.create_server(connection, "127.0.0.1", 0)
        listening(str(server.sockets[0].getsockname()[1]))
    await made


Opener = Callable[[Engine, str, Callable[[str], None]], Awaitable[None]]
WAYS: dict[str, tuple[bool, Opener]] = {  # by name: whether msgspec is needed
    "JSON, socket and receiver thread: today": (False, _today),
    "framed, socket and receiver thread": (True, _socket),
    "framed, by the processes' loops": (True, _by_loop),
}


def measure(name: str, loop: str, trips: int) -> Trips:
    """One way, in two new processes."""
    first = Process(echo_main, loop, name)
    try:
        second = Process(ask_main, loop, name, first.told())
        try:
            second.call("ask", trips // 10)
            done: Trips = second.call("ask", trips)
            return done
        finally:
            second.end()
    finally:
        first.end()


async def echo_main(pipe: "Pipe[Any, Any]", name: str) -> None:
    engine = Engine()
    await WAYS[name][1](engine, "", pipe.send)

    def echo() -> None:
        while True:
            engine.post(engine.wait())

    await asyncio.to_thread(echo)


async def ask_main(pipe: "Pipe[Any, Any]", name: str, address: str) -> None:
    engine = Engine()
    await WAYS[name][1](engine, address, lambda listening: None)

    def ask(count: int) -> Trips:
        trips_s, cpu = [], time.process_time()
        for _ in range(count):
            started = time.perf_counter()
            engine.post(_EVENT)
            engine.wait()
            trips_s.append(time.perf_counter() - started)
        return Trips(trips_s, (time.process_time() - cpu) / count)

    while True:
        _, count = await asyncio.to_thread(pipe.recv)
        pipe.send(await asyncio.to_thread(ask, count))
