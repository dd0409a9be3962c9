"""How events come from the cells to the router that asked: a connection each, for all of its requests.

Serve's handle picks the cell and carries the request, an error, a cancel and the fact that a call has ended. A block
does not go through it: an item of a Serve stream costs both processes about 2 ms of their interpreters, a frame some
tens of microseconds.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from actors.frames import (
    GREETING_S,
    TOKEN_BYTES,
    LineAddress,
    at_once,
    connect,
    framed,
    is_token,
    new_token,
    read_frame,
)
from twotower.core import AnswerEvent, BlockEvent, FailureEvent, ScoreEvent
from twotower.engine.inbox import Inbox
from twotower.errors import Unavailable
from twotower.wire import Codec, CodecError, from_json, to_json

logger = logging.getLogger(__name__)

_CODEC: Codec[AnswerEvent | FailureEvent] = Codec(BlockEvent, ScoreEvent, FailureEvent)
_CONNECT_S = 5.0
_END_S = 1.0  # a failure is told in less
_GONE = "the router that asked is gone"


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where one call's events go: a router, and the call's number there."""

    address: LineAddress
    key: int


class EventServer:
    """The router's end: takes events off the connections of all cells and puts each into its call's inbox."""

    def __init__(self) -> None:
        self._inboxes: dict[int, Inbox] = {}
        self._keys = itertools.count()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    async def start(self, host: str) -> None:
        """Listen on `host`, an address of this machine that the cells reach."""
        token = new_token()
        self._token = token
        self._server = await asyncio.start_server(self._serve, host, 0)
        self.address = LineAddress(host, int(self._server.sockets[0].getsockname()[1]), token)

    def open(self, merging: bool) -> tuple[ReplyTo, Inbox]:
        """A place for one call's events; `close` it."""
        key, inbox = next(self._keys), Inbox(merging)
        self._inboxes[key] = inbox
        return ReplyTo(self.address, key), inbox

    def is_open(self, reply_to: ReplyTo) -> bool:
        return reply_to.key in self._inboxes

    def close(self, reply_to: ReplyTo) -> None:
        """What still comes for this call is dropped."""
        self._inboxes.pop(reply_to.key, None)

    def tell_all(self, event: FailureEvent) -> None:
        """Every call that is open hears of it."""
        for inbox in self._inboxes.values():
            inbox.put(event)

    def stop(self) -> None:
        """Hang up on every cell."""
        if self._server is not None:
            self._server.close()
        for writer in self._connections:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            async with asyncio.timeout(GREETING_S):
                shown = await reader.readexactly(TOKEN_BYTES)
            if is_token(shown, self._token):
                at_once(writer.get_extra_info("socket"))
                while True:
                    self._take(await read_frame(reader))
        except (OSError, EOFError):
            pass  # the call through Serve tells what became of the cell
        except CodecError as error:
            logger.error("a cell sent what is no event: %s", error)
        finally:
            self._connections.discard(writer)
            writer.close()

    def _take(self, frame: bytes) -> None:
        match from_json(frame):
            case [int(key), event]:
                inbox = self._inboxes.get(key)
                if inbox is not None:
                    inbox.put(_CODEC.message(event))
            case _:
                raise CodecError(f"got {frame[:80]!r}, wanted [key, event]")


class EventLine:
    """The cell's end of one connection. `held_by`: the calls that send on it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.held_by: set[asyncio.Task[Any]] = set()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For as long as a call has events to send. Raises Unavailable in it as soon as the router is gone: nobody
        waits for them any more."""
        task = asyncio.current_task()
        assert task is not None
        self.held_by.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task in self.held_by or task.uncancel():
                raise  # somebody else wants it to end, too or alone
            raise Unavailable(_GONE) from None
        finally:
            self.held_by.discard(task)

    @property
    def lost(self) -> bool:
        return self._writer.is_closing()

    async def send(self, key: int, event: AnswerEvent | FailureEvent) -> None:
        """Raises Unavailable when the router is gone."""
        try:
            if not self.lost:
                self._writer.write(framed(to_json([key, _CODEC.plain(event)])))
                await self._writer.drain()
                return
        except OSError:
            pass
        raise Unavailable(_GONE)

    def close(self) -> None:
        self._writer.close()

    async def watch(self, reader: asyncio.StreamReader) -> None:
        """A router says nothing on its line: reading only shows when it is gone."""
        with contextlib.suppress(OSError):
            await reader.read(1)
        self._writer.close()
        given_up, self.held_by = self.held_by, set()
        for task in given_up:
            task.cancel()


class EventLines:
    """A cell's connections to its routers, made when first used and again when lost."""

    def __init__(self) -> None:
        self._lines: dict[LineAddress, EventLine] = {}
        self._connecting = asyncio.Lock()
        self._watches: set[asyncio.Task[None]] = set()

    async def to(self, address: LineAddress) -> EventLine:
        """Raises Unavailable where the router cannot be reached."""
        async with self._connecting:
            line = self._lines.get(address)
            if line is None or line.lost:
                line = self._lines[address] = await self._connect(address)
            return line

    async def _connect(self, address: LineAddress) -> EventLine:
        try:
            reader, writer = await connect(address, _CONNECT_S)
        except OSError as error:
            raise Unavailable(f"the router at {address.host}:{address.port} cannot be reached") from error
        line = EventLine(writer)
        watch = asyncio.create_task(line.watch(reader))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        return line

    async def close(self) -> None:
        """Once the calls that hold a line have ended, or soon."""
        calls = [call for line in self._lines.values() for call in line.held_by]
        if calls:
            await asyncio.wait(calls, timeout=_END_S)
        for line in self._lines.values():
            line.close()
