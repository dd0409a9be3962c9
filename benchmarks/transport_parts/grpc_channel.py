"""grpc.aio with msgspec payloads: one stream both ways for all runs, or a call that streams its answer for each run.

Signs of life are HTTP/2 pings. gRPC's own threads answer them, whatever the interpreter does.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
import msgspec

from benchmarks.transport_parts.messages import (
    Block,
    Cancel,
    Ended,
    Message,
    Open,
    Outbox,
    decode_all,
    encode,
    message_of,
)
from benchmarks.transport_parts.seam import BEAT_S, SILENCE_S, Answer, Answerer, Desk, Emit, Gone, Runs, Secrets
from twotower.core import ReleasedEvent, Request

_PINGS = [
    ("grpc.keepalive_time_ms", int(BEAT_S * 1e3)),
    ("grpc.keepalive_timeout_ms", int((SILENCE_S - BEAT_S) * 1e3)),
    ("grpc.http2.ping_timeout_ms", int((SILENCE_S - BEAT_S) * 1e3)),  # else 60 s, whatever the line above says
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
]
_STREAM, _CALL = "/cell/Stream", "/cell/Call"
_decode_open = msgspec.msgpack.Decoder(Open).decode
_decode_answer: Callable[[bytes], Block | Ended] = msgspec.msgpack.Decoder(Block | Ended).decode


class GrpcServer(grpc.GenericRpcHandler):
    async def serve(self, answer: Answerer, lost: Callable[[str], None], secrets: Secrets | None) -> str:
        self._answer, self._lost = answer, lost
        self._server = grpc.aio.server(options=_PINGS)
        self._server.add_generic_rpc_handlers([self])
        if secrets is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            pair = (secrets.key.read_bytes(), secrets.certificate.read_bytes())
            port = self._server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        await self._server.start()
        return f"127.0.0.1:{port}"

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method == _STREAM:
            return grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.unary_stream_rpc_method_handler(self._call, _decode_open, encode)

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        async def send(messages: Sequence[Message]) -> None:
            await context.write(encode(messages))

        desk, outbox = Desk(self._answer, self._lost), Outbox(send)
        try:
            async for frame in requests:
                for message in decode_all(frame):
                    if isinstance(message, Open):
                        desk.open(message.run, message.request, _posting(outbox, message.run))
                    else:
                        desk.cancel(message.run)
        finally:
            outbox.close()
            desk.lose("the stream ended")

    async def _call(self, opened: Open, context: Any) -> None:
        async def emit(event: Answer) -> None:
            await context.write(message_of(opened.run, event))

        try:
            await self._answer(opened.request, emit)
        except asyncio.CancelledError:
            self._lost("the call was cancelled")
            raise


def _posting(outbox: Outbox, run: int) -> Emit:
    async def emit(event: Answer) -> None:
        outbox.post(message_of(run, event))
        await outbox.room()

    return emit


def _channel(address: str, secrets: Secrets | None) -> grpc.aio.Channel:
    if secrets is None:
        return grpc.aio.insecure_channel(address, options=_PINGS)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(secrets.certificate.read_bytes()), _PINGS)


class StreamAsker:
    def __init__(self, address: str, secrets: Secrets | None) -> None:
        self._channel = _channel(address, secrets)
        self._stream = self._channel.stream_stream(_STREAM)()
        self._outbox = Outbox(self._send)
        self._runs = Runs(
            lambda run, request: self._outbox.post(Open(run, request)), lambda run: self._outbox.post(Cancel(run))
        )
        self._reading = asyncio.ensure_future(self._read())

    def ask(self, run: int, request: Request) -> AsyncIterator[Answer]:
        return self._runs.ask(run, request)

    async def close(self) -> None:
        self._outbox.close()
        self._reading.cancel()
        await self._channel.close()

    async def _send(self, messages: Sequence[Message]) -> None:
        await self._stream.write(encode(messages))

    async def _read(self) -> None:
        try:
            while (frame := await self._stream.read()) is not grpc.aio.EOF:
                for message in decode_all(frame):
                    self._runs.take(message.run, _event(message))
            self._runs.lose("the stream ended")
        except grpc.aio.AioRpcError as error:
            self._runs.lose(_reason(error))


class CallAsker:
    def __init__(self, address: str, secrets: Secrets | None) -> None:
        self._channel = _channel(address, secrets)
        self._method = self._channel.unary_stream(_CALL, encode, _decode_answer)

    async def ask(self, run: int, request: Request) -> AsyncIterator[Answer]:
        try:
            async for message in self._method(Open(run, request)):
                yield _event(message)
        except grpc.aio.AioRpcError as error:
            raise Gone(_reason(error)) from error

    async def close(self) -> None:
        await self._channel.close()


def _event(message: Message) -> Answer:
    if isinstance(message, Block):
        return message.event
    assert isinstance(message, Ended)
    return ReleasedEvent(message.request_id)


def _reason(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"


async def connect_stream(address: str, secrets: Secrets | None) -> StreamAsker:
    return StreamAsker(address, secrets)


async def connect_calls(address: str, secrets: Secrets | None) -> CallAsker:
    return CallAsker(address, secrets)
