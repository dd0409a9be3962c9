"""A cell's end of its connections to the asking routers: one connection each, for all of a router's calls."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cluster.runs import line_tls
from cluster.runs.messages import CODEC, ROUTER_SILENCE_S, Beat, Message, OfCall, Waits
from twotower.errors import Unavailable
from twotower.transport.connection import Connection, connect
from twotower.transport.handshake import Address

_END_S = 1.0  # a failure is sent within this time
_GONE = "the router that asked is gone"


class RouterLine:
    """The connection to one router. `held_by`: the calls that send on it. `waits`: the router's last beat."""

    def __init__(self, beat: Callable[[], Beat]) -> None:
        self._beat = beat
        self.held_by: set[asyncio.Task[Any]] = set()
        self.waits = Waits(0, 0.0)
        self.connection: Connection[Message] | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Held while a call has events to send. Raises Unavailable inside as soon as the router is lost, because its
        events have no reader.
        """
        task = asyncio.current_task()
        assert task is not None
        self.held_by.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task in self.held_by or task.uncancel():
                raise  # the task was also cancelled from elsewhere
            raise Unavailable(_GONE) from None
        finally:
            self.held_by.discard(task)

    @property
    def is_lost(self) -> bool:
        return self.connection is None or self.connection.lost is not None

    async def send(self, message: OfCall) -> None:
        """Raises Unavailable when the router is lost."""
        assert self.connection is not None
        try:
            self.connection.post(message)
            await self.connection.room()
        except Unavailable:
            raise Unavailable(_GONE) from None

    def take(self, message: Message) -> None:
        if not isinstance(message, Waits):
            raise Unavailable(f"sent a {type(message).__name__}, wanted nothing but Waits")
        self.waits = message

    def beat(self) -> Sequence[Beat]:
        return [self._beat()]

    def lost(self, reason: str) -> None:
        given_up, self.held_by = self.held_by, set()
        for task in given_up:
            task.cancel()


class RouterLines:
    """Connections that are made at first use and again after a loss. `beat`: the cell's beat.

    Raises ConfigError for wrong files of TLS.
    """

    def __init__(self, beat: Callable[[], Beat], silence_s: float = ROUTER_SILENCE_S) -> None:
        self._beat, self._silence_s, self._tls = beat, silence_s, line_tls.connecting()
        self._lines: dict[Address, RouterLine] = {}
        self._connecting: dict[Address, asyncio.Task[RouterLine]] = {}
        self._closed = False

    async def to(self, address: Address) -> RouterLine:
        """Raises Unavailable if the router cannot be reached, or if this cell has closed its lines."""
        if self._closed:
            raise Unavailable("the cell is shutting down")
        line = self._lines.get(address)
        if line is not None and not line.is_lost:
            return line
        connecting = self._connecting.get(address)
        if connecting is None:
            connecting = self._connecting[address] = asyncio.create_task(self._connect(address))
            connecting.add_done_callback(lambda done: self._connected(address, done))
        return await asyncio.shield(connecting)

    def waits(self) -> list[Waits]:
        """The waits of each living router."""
        return [line.waits for line in self._lines.values() if not line.is_lost]

    def _connected(self, address: Address, done: "asyncio.Task[RouterLine]") -> None:
        del self._connecting[address]
        if not done.cancelled():
            done.exception()  # waiting calls get the error; no further calls may wait

    async def _connect(self, address: Address) -> RouterLine:
        self._lines = {known: line for known, line in self._lines.items() if not line.is_lost}
        line = RouterLine(self._beat)
        try:
            line.connection, _ = await connect(address, {}, CODEC, line, silence_s=self._silence_s, tls=self._tls)
        except Unavailable as error:
            raise Unavailable(f"the router at {error}") from error
        if self._closed:
            line.connection.close()
            raise Unavailable("the cell is shutting down")
        self._lines[address] = line
        return line

    async def close(self) -> None:
        """Once the calls that hold a line have ended, or soon."""
        self._closed = True
        calls = [call for line in self._lines.values() for call in line.held_by]
        if calls:
            await asyncio.wait(calls, timeout=_END_S)
        for line in self._lines.values():
            if line.connection is not None:
                line.connection.close()
