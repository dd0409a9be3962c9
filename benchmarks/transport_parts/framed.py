"""Our own framing over asyncio's Protocol, with msgspec: a length and a list of messages; an empty list is a beat.

What is posted in one turn of the loop leaves as one frame. Both ends beat; three silent seconds end the connection.
"""

import asyncio
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from typing import cast

from benchmarks.transport_parts.messages import Block, Cancel, Ended, Message, Open, decode_all, encode, message_of
from benchmarks.transport_parts.seam import BEAT_S, SILENCE_S, Answer, Answerer, Desk, Emit, Runs, Secrets
from twotower.core import ReleasedEvent, Request

_LENGTH = struct.Struct("!I")
_MOST_BYTES = 64 << 20
_BUFFER_BYTES = 1 << 20


def framed(messages: list[Message]) -> bytes:
    body = encode(messages)
    return _LENGTH.pack(len(body)) + body


class Connection(asyncio.Protocol):
    """One end. `take` gets every message, `lost` the reason why there are no more."""

    def __init__(self, take: Callable[[Message], None], lost: Callable[[str], None]) -> None:
        self._take, self._lost = take, lost
        self._received, self._waiting = bytearray(), list[Message]()
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Event()
        self._room.set()
        self._reason = "the other end is gone"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._transport.set_write_buffer_limits(high=_BUFFER_BYTES)
        self._heard_at = self._loop.time()
        self._beat()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._room.set()
        self._lost(self._reason)

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self._received += data
        start, held = 0, len(self._received)
        while held - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received, start)
            if length > _MOST_BYTES:
                self._give_up(f"got a frame of {length} bytes, wanted at most {_MOST_BYTES}")
                return
            end = start + _LENGTH.size + length
            if held < end:
                break
            for message in decode_all(self._received[start + _LENGTH.size : end]):
                self._take(message)
            start = end
        del self._received[:start]

    def post(self, message: Message) -> None:
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(message)

    async def room(self) -> None:
        if not self._room.is_set():
            await self._room.wait()

    def close(self) -> None:
        self._transport.close()

    def _flush(self) -> None:
        messages, self._waiting = self._waiting, []
        self._send(messages)

    def _send(self, messages: list[Message]) -> None:
        self._transport.write(framed(messages))

    def _beat(self) -> None:
        silent_s = self._loop.time() - self._heard_at
        if silent_s > SILENCE_S:
            self._give_up(f"silent for {SILENCE_S:g} s")
            return
        self._send([])
        self._timer = self._loop.call_later(min(BEAT_S, SILENCE_S - silent_s + 0.001), self._beat)

    def _give_up(self, reason: str) -> None:
        self._reason = reason
        self._transport.abort()


class FramedServer:
    async def serve(self, answer: Answerer, lost: Callable[[str], None], secrets: Secrets | None) -> str:
        context = None
        if secrets is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(secrets.certificate, secrets.key)

        def connection() -> Connection:
            desk = Desk(answer, lost)

            def take(message: Message) -> None:
                if isinstance(message, Open):
                    desk.open(message.run, message.request, _emit(made, message.run))
                else:
                    desk.cancel(message.run)

            made = Connection(take, desk.lose)
            return made

        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(connection, "127.0.0.1", 0, ssl=context)
        return str(self._server.sockets[0].getsockname()[1])


def _emit(connection: Connection, run: int) -> Emit:
    async def emit(event: Answer) -> None:
        connection.post(message_of(run, event))
        await connection.room()

    return emit


class FramedAsker:
    def __init__(self) -> None:
        self._runs = Runs(
            lambda run, request: self._connection.post(Open(run, request)),
            lambda run: self._connection.post(Cancel(run)),
        )

    async def connect(self, address: str, secrets: Secrets | None) -> "FramedAsker":
        context = None
        if secrets is not None:
            context = ssl.create_default_context(cafile=str(secrets.certificate))
        loop = asyncio.get_running_loop()
        _, self._connection = await loop.create_connection(
            lambda: Connection(self._take, self._runs.lose), "127.0.0.1", int(address), ssl=context
        )
        return self

    def ask(self, run: int, request: Request) -> AsyncIterator[Answer]:
        return self._runs.ask(run, request)

    async def close(self) -> None:
        self._connection.close()

    def _take(self, message: Message) -> None:
        match message:
            case Block(run, event):
                self._runs.take(run, event)
            case Ended(run, request_id):
                self._runs.take(run, ReleasedEvent(request_id))


async def connect(address: str, secrets: Secrets | None) -> FramedAsker:
    return await FramedAsker().connect(address, secrets)
