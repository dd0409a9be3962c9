"""asyncio's streams. As today: the product's frames and JSON, an event a frame, no sign of life, no bound on an inbox.

`MsgpackServer` and `connect_msgpack` change the codec alone, which shows what the rest of the framing costs.
"""

import asyncio
import importlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from actors.frames import LineAddress, at_once, connect, framed, is_token, new_token, read_frame
from benchmarks.transport_parts.seam import Answer, Answerer, Desk, Emit, Runs, Secrets
from twotower.core import BlockEvent, ReleasedEvent, Request
from twotower.wire import Codec, from_json, to_json

_TOKEN_BYTES = 32
_CODEC: Codec[Request | BlockEvent | ReleasedEvent] = Codec(Request, BlockEvent, ReleasedEvent)

Encode = Callable[[int, Request | Answer], bytes]
Decode = Callable[[bytes], tuple[int, Any]]


def to_json_frame(run: int, said: Request | Answer) -> bytes:
    return to_json([run, _CODEC.plain(said)])


def _from_json(frame: bytes) -> tuple[int, Any]:
    run, said = from_json(frame)
    return run, _CODEC.message(said)


def _msgpack() -> tuple[Encode, Decode]:
    """One message a frame."""
    m = importlib.import_module("benchmarks.transport_parts.messages")

    def encode(run: int, said: Request | Answer) -> bytes:
        return m.encode([m.Open(run, said) if isinstance(said, Request) else m.message_of(run, said)])

    def decode(frame: bytes) -> tuple[int, Any]:
        [message] = m.decode_all(frame)
        match message:
            case m.Open(run, request):
                return run, request
            case m.Block(run, event):
                return run, event
        return message.run, ReleasedEvent(message.request_id)

    return encode, decode


class StreamServer:
    def __init__(self, encode: Encode = to_json_frame, decode: Decode = _from_json) -> None:
        self._encode, self._decode = encode, decode

    async def serve(self, answer: Answerer, lost: Callable[[str], None], secrets: Secrets | None) -> str:
        self._answer, self._lost, self._token = answer, lost, new_token()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"{self._server.sockets[0].getsockname()[1]} {self._token.hex()}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        desk = Desk(self._answer, self._lost)
        try:
            if is_token(await reader.readexactly(_TOKEN_BYTES), self._token):
                at_once(writer.get_extra_info("socket"))
                while True:
                    run, request = self._decode(await read_frame(reader))
                    desk.open(run, request, self._emit(writer, run))
        except (OSError, EOFError) as error:
            desk.lose(type(error).__name__)
        finally:
            writer.close()

    def _emit(self, writer: asyncio.StreamWriter, run: int) -> Emit:
        async def emit(event: Answer) -> None:
            writer.write(framed(self._encode(run, event)))
            await writer.drain()

        return emit


class StreamAsker:
    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, encode: Encode, decode: Decode
    ) -> None:
        self._writer, self._encode, self._decode = writer, encode, decode
        self._runs = Runs(self._open, lambda run: None, bound=None)  # today Serve carries a cancel
        self._reading = asyncio.ensure_future(self._read(reader))

    def ask(self, run: int, request: Request) -> AsyncIterator[Answer]:
        return self._runs.ask(run, request)

    async def close(self) -> None:
        self._writer.close()
        await self._reading

    def _open(self, run: int, request: Request) -> None:
        self._writer.write(framed(self._encode(run, request)))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._runs.take(*self._decode(await read_frame(reader)))
        except (OSError, EOFError) as error:
            self._runs.lose(type(error).__name__)


async def connect_json(
    address: str, secrets: Secrets | None, encode: Encode = to_json_frame, decode: Decode = _from_json
) -> StreamAsker:
    port, token = address.split()
    streams = await connect(LineAddress("127.0.0.1", int(port), bytes.fromhex(token)), 5.0)
    return StreamAsker(*streams, encode, decode)


class MsgpackServer(StreamServer):
    def __init__(self) -> None:
        super().__init__(*_msgpack())


async def connect_msgpack(address: str, secrets: Secrets | None) -> StreamAsker:
    return await connect_json(address, secrets, *_msgpack())
