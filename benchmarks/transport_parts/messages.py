"""The typed messages: msgspec structs that carry the project's own nouns, as msgpack."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from benchmarks.transport_parts.seam import Answer
from twotower.core import BlockEvent, Request, RequestId


class Open(msgspec.Struct, tag="o", array_like=True, frozen=True):
    run: int
    request: Request


class Block(msgspec.Struct, tag="b", array_like=True, frozen=True):
    run: int
    event: BlockEvent


class Ended(msgspec.Struct, tag="e", array_like=True, frozen=True):
    run: int
    request_id: RequestId


class Cancel(msgspec.Struct, tag="c", array_like=True, frozen=True):
    run: int


Message = Open | Block | Ended | Cancel

encode = msgspec.msgpack.Encoder().encode
decode_all: Callable[[bytes | bytearray | memoryview], list[Message]] = msgspec.msgpack.Decoder(list[Message]).decode


def message_of(run: int, event: Answer) -> Message:
    return Block(run, event) if isinstance(event, BlockEvent) else Ended(run, event.request_id)


class Outbox:
    """What is posted in one turn of the loop leaves as one frame. `send` may wait; `room` then makes posters wait."""

    _MOST = 1024

    def __init__(self, send: Callable[[Sequence[Message]], Awaitable[None]]) -> None:
        self._send = send
        self._waiting: list[Message] = []
        self._posted, self._taken = asyncio.Event(), asyncio.Event()
        self._pump = asyncio.ensure_future(self._run())

    def post(self, message: Message) -> None:
        self._waiting.append(message)
        self._posted.set()

    async def room(self) -> None:
        while len(self._waiting) >= self._MOST:
            self._taken.clear()
            await self._taken.wait()

    def close(self) -> None:
        self._pump.cancel()

    async def _run(self) -> None:
        while True:
            await self._posted.wait()
            self._posted.clear()
            messages, self._waiting = self._waiting, []
            await self._send(messages)
            self._taken.set()
