"""pyzmq: the cell's ROUTER and the router's DEALER, msgspec payloads, ZeroMQ's own heartbeats.

ZeroMQ hides a lost peer and connects again; a monitor on the socket tells of it. Its threads answer heartbeats,
whatever the interpreter does. It has no TLS (CURVE in its place).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

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
from benchmarks.transport_parts.seam import BEAT_S, SILENCE_S, Answer, Answerer, Desk, Emit, Runs, Secrets
from twotower.core import ReleasedEvent, Request


def _socket(kind: int) -> Any:
    socket = zmq.asyncio.Context.instance().socket(kind)
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(BEAT_S * 1e3))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int((SILENCE_S - BEAT_S) * 1e3))
    socket.setsockopt(zmq.LINGER, 0)
    return socket


async def _until_lost(monitor: Any) -> str:
    while True:
        event = parse_monitor_message(await monitor.recv_multipart())["event"]
        if event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
            return "the monitor says: disconnected"


class ZmqServer:
    async def serve(self, answer: Answerer, lost: Callable[[str], None], secrets: Secrets | None) -> str:
        self._socket = _socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._desk = Desk(answer, lost)
        self._outboxes: dict[bytes, Outbox] = {}
        self._tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._watch(monitor))]
        return f"tcp://127.0.0.1:{port}"

    async def _read(self) -> None:
        while True:
            peer, frame = await self._socket.recv_multipart()
            if peer not in self._outboxes:
                self._outboxes[peer] = Outbox(self._sender(peer))
            for message in decode_all(frame):
                if isinstance(message, Open):
                    self._desk.open(message.run, message.request, self._emit(self._outboxes[peer], message.run))
                else:
                    self._desk.cancel(message.run)

    def _sender(self, peer: bytes) -> Callable[[Sequence[Message]], Any]:
        async def send(messages: Sequence[Message]) -> None:
            await self._socket.send_multipart([peer, encode(messages)])

        return send

    def _emit(self, outbox: Outbox, run: int) -> Emit:
        async def emit(event: Answer) -> None:
            outbox.post(message_of(run, event))
            await outbox.room()

        return emit

    async def _watch(self, monitor: Any) -> None:
        self._desk.lose(await _until_lost(monitor))


class ZmqAsker:
    def __init__(self, address: str) -> None:
        self._socket = _socket(zmq.DEALER)
        monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)
        self._outbox = Outbox(self._send)
        self._runs = Runs(
            lambda run, request: self._outbox.post(Open(run, request)), lambda run: self._outbox.post(Cancel(run))
        )
        self._tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._watch(monitor))]

    def ask(self, run: int, request: Request) -> AsyncIterator[Answer]:
        return self._runs.ask(run, request)

    async def close(self) -> None:
        self._outbox.close()
        for task in self._tasks:
            task.cancel()
        self._socket.disable_monitor()
        self._socket.close()

    async def _send(self, messages: Sequence[Message]) -> None:
        await self._socket.send(encode(messages))

    async def _read(self) -> None:
        while True:
            for message in decode_all(await self._socket.recv()):
                match message:
                    case Block(run, event):
                        self._runs.take(run, event)
                    case Ended(run, request_id):
                        self._runs.take(run, ReleasedEvent(request_id))

    async def _watch(self, monitor: Any) -> None:
        self._runs.lose(await _until_lost(monitor))


async def connect(address: str, secrets: Secrets | None) -> ZmqAsker:
    return ZmqAsker(address)
