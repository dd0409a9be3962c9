"""How events come from the cells to the router that asked: a connection each, for all of its requests.

Serve's handle picks the cell and carries the request, an error, a cancel and the fact that a call has ended. A block
does not go through it: an item of a Serve stream costs both processes about 2 ms of their interpreters, a frame some
tens of microseconds.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from cluster.pulse import BEAT_S, CELL_MISSES, ROUTER_MISSES, Beat, Pulse
from twotower.core import AnswerEvent, BlockEvent, FailureEvent, RequestId, ScoreEvent
from twotower.engine.inbox import Inbox
from twotower.errors import Unavailable
from twotower.wire import Codec, CodecError, from_json, to_json

logger = logging.getLogger(__name__)

_CONNECT_S = 5.0
_REMEMBERED = 64  # cells that are gone
_MANY = 64  # beats of a router
_END_S = 1.0  # a failure is told in less
_ANY = RequestId("*")
_GONE = "the router that asked is gone"


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where one call's events go: a router, and the call's number there."""

    address: LineAddress
    key: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A cell has taken the call: which one, and with what checkpoint. Comes before all events."""

    cell: str
    fingerprint: str


_Message = Placed | AnswerEvent | FailureEvent
_CODEC: Codec[_Message | Beat] = Codec(Placed, BlockEvent, ScoreEvent, FailureEvent, Beat)


class Call:
    """The router's end of one call: who has taken it, or why nobody has; then its events."""

    def __init__(self, reply_to: ReplyTo, merging: bool) -> None:
        self.reply_to, self.inbox = reply_to, Inbox(merging)
        self.placed: asyncio.Future[Placed] = asyncio.get_running_loop().create_future()
        self.line: CellLine | None = None  # where its events come from

    def take(self, message: _Message) -> None:
        if isinstance(message, Placed):
            if not self.placed.done():
                self.placed.set_result(message)
        elif isinstance(message, FailureEvent) and not self.placed.done():
            self.placed.set_exception(message.error)
        else:
            self.inbox.put(message)


class CellLine:
    """The router's end of one connection: whose it is, and how that cell is."""

    def __init__(self, writer: asyncio.StreamWriter, calls: dict[int, Call]) -> None:
        self._writer, self._calls = writer, calls
        self.beat: Beat | None = None
        self._why_lost = "is gone"
        self._pulse = Pulse(partial(writer.write, b"."), self._hang_up, CELL_MISSES)

    async def read(self, reader: asyncio.StreamReader) -> None:
        """Hands out what comes, until the connection ends or the cell is silent for too long."""
        beating = asyncio.create_task(self._pulse.beat())
        try:
            while True:
                self._take(await read_frame(reader))
        except (OSError, EOFError):
            pass
        except CodecError as error:
            logger.error("a cell sent what is no event: %s", error)
        finally:
            beating.cancel()
            self.close()
            lost = FailureEvent(_ANY, Unavailable(f"the cell that served this request {self._why_lost}"))
            for call in self._calls.values():
                if call.line is self:
                    call.take(lost)

    def close(self) -> None:
        self._writer.close()

    def _hang_up(self) -> None:
        self._why_lost = f"has been silent for {CELL_MISSES * BEAT_S:g} s"
        self._writer.transport.abort()

    def _take(self, frame: bytes) -> None:
        self._pulse.heard()
        match from_json(frame):
            case [None, plain]:
                beat = _CODEC.message(plain)
                if not isinstance(beat, Beat):
                    raise CodecError(f"got {type(beat).__name__}, wanted a Beat")
                self.beat = beat
            case [int(key), plain]:
                self._give(key, plain)
            case _:
                raise CodecError(f"got {frame[:80]!r}, wanted [key, event]")

    def _give(self, key: int, plain: object) -> None:
        call, message = self._calls.get(key), _CODEC.message(plain)
        if isinstance(message, Beat):
            raise CodecError("got a Beat, wanted an event")
        if call is not None:
            if isinstance(message, Placed):
                call.line = self
            call.take(message)


class EventServer:
    """The router's end: takes events off the connections of all cells and hands each to its call."""

    def __init__(self) -> None:
        self._calls: dict[int, Call] = {}
        self._keys = itertools.count()
        self._server: asyncio.Server | None = None
        self._lines: set[CellLine] = set()
        self._lost: deque[str] = deque(maxlen=_REMEMBERED)

    async def start(self, host: str) -> None:
        """Listen on `host`, an address of this machine that the cells reach."""
        token = new_token()
        self._token = token
        self._server = await asyncio.start_server(self._serve, host, 0)
        self.address = LineAddress(host, int(self._server.sockets[0].getsockname()[1]), token)

    def living(self) -> set[str]:
        """The cells that have a line here and serve."""
        return {line.beat.cell for line in self._lines if line.beat is not None and line.beat.serves}

    def dead(self) -> set[str]:
        """Those that had a line and have none any more, or cannot serve. Serve may not know it yet."""
        mending = {line.beat.cell for line in self._lines if line.beat is not None and not line.beat.serves}
        return mending | set(self._lost) - self.living()

    def open(self, merging: bool) -> Call:
        """A place for one call's events; `close` it."""
        key = next(self._keys)
        call = self._calls[key] = Call(ReplyTo(self.address, key), merging)
        return call

    def is_open(self, call: Call) -> bool:
        return call.reply_to.key in self._calls

    def close(self, call: Call) -> None:
        """What still comes for this call is dropped."""
        self._calls.pop(call.reply_to.key, None)
        if not call.placed.cancel() and not call.placed.cancelled():
            call.placed.exception()  # somebody has seen it

    def stop(self) -> None:
        """Hang up on every cell."""
        if self._server is not None:
            self._server.close()
        for line in self._lines:
            line.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = CellLine(writer, self._calls)
        self._lines.add(line)
        try:
            async with asyncio.timeout(GREETING_S):
                shown = await reader.readexactly(TOKEN_BYTES)
            if is_token(shown, self._token):
                at_once(writer.get_extra_info("socket"))
                await line.read(reader)
        except (OSError, EOFError):
            pass
        finally:
            line.close()
            self._lines.discard(line)
            if line.beat is not None:
                self._lost.append(line.beat.cell)


class EventLine:
    """The cell's end of one connection. `held_by`: the calls that send on it."""

    def __init__(self, writer: asyncio.StreamWriter, beat: Callable[[], Beat]) -> None:
        self._writer, self._beat = writer, beat
        self.held_by: set[asyncio.Task[Any]] = set()
        self._pulse = Pulse(self._say, writer.transport.abort, ROUTER_MISSES)

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

    async def send(self, key: int, event: _Message) -> None:
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

    def _say(self) -> None:
        self._writer.write(framed(to_json([None, _CODEC.plain(self._beat())])))

    async def watch(self, reader: asyncio.StreamReader) -> None:
        """A router says nothing on its line but that it lives. Ends once it is gone, or silent for too long."""
        beating = asyncio.create_task(self._pulse.beat())
        with contextlib.suppress(OSError):
            while await reader.read(_MANY):
                self._pulse.heard()
        beating.cancel()
        self._writer.close()
        given_up, self.held_by = self.held_by, set()
        for task in given_up:
            task.cancel()


class EventLines:
    """A cell's connections to its routers, made when first used and again when lost. `beat`: how the cell is."""

    def __init__(self, beat: Callable[[], Beat]) -> None:
        self._beat = beat
        self._lines: dict[LineAddress, EventLine] = {}
        self._connecting = asyncio.Lock()
        self._closed = False
        self._watches: set[asyncio.Task[None]] = set()

    async def to(self, address: LineAddress) -> EventLine:
        """Raises Unavailable where the router cannot be reached, or where this cell has closed its lines."""
        async with self._connecting:
            if self._closed:
                raise Unavailable("the cell is shutting down")
            line = self._lines.get(address)
            if line is None or line.lost:
                line = self._lines[address] = await self._connect(address)
            return line

    async def _connect(self, address: LineAddress) -> EventLine:
        try:
            reader, writer = await connect(address, _CONNECT_S)
        except OSError as error:
            raise Unavailable(f"the router at {address.host}:{address.port} cannot be reached") from error
        line = EventLine(writer, self._beat)
        watch = asyncio.create_task(line.watch(reader))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        return line

    async def close(self) -> None:
        """Once the calls that hold a line have ended, or soon."""
        self._closed = True
        calls = [call for line in self._lines.values() for call in line.held_by]
        if calls:
            await asyncio.wait(calls, timeout=_END_S)
        for line in self._lines.values():
            line.close()
