"""A router's end of its connections to the cells: which cells live, and the events of every call.

Serve's handle picks the cell and carries the request, an error, a cancel and the end of a call. Blocks use these
connections instead. An item of a Serve stream costs both processes about 2 ms of interpreter time, a message here some
tens of microseconds.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.runs import line_tls
from cluster.runs.messages import (
    CELL_SILENCE_S,
    CODEC,
    Beat,
    Block,
    Failed,
    Message,
    OfCall,
    Placed,
    ReplyTo,
    Scored,
    Stepped,
    Verdict,
    Waits,
)
from twotower.core import FailureEvent, Mode, RequestId
from twotower.engine.inbox import Inbox
from twotower.errors import Unavailable
from twotower.transport.connection import Connection, Listener, listen
from twotower.transport.handshake import About

_REMEMBERED = 64  # cells that have ended
_ANY = RequestId("*")


class Call:
    """One call: the cell that has taken it, or why none has; then its events."""

    def __init__(self, reply_to: ReplyTo, merging: bool) -> None:
        self.reply_to, self.inbox = reply_to, Inbox(merging)
        self.placed: asyncio.Future[Placed] = asyncio.get_running_loop().create_future()
        self.line: CellLine | None = None  # the line of its events

    def take(self, message: OfCall) -> None:
        match message:
            case Placed():
                if not self.placed.done():
                    self.placed.set_result(message)
            case Failed(event=event):
                self.fail(event)
            case Block(event=event) | Scored(event=event) | Stepped(event=event) | Verdict(event=event):
                self.inbox.put(event)

    def fail(self, event: FailureEvent) -> None:
        """Nothing follows."""
        if self.placed.done():
            self.inbox.put(event)
        else:
            self.placed.set_exception(event.error)


class CellLine:
    """The connection of one cell."""

    def __init__(self, lines: "CellLines", connection: Connection[Message]) -> None:
        self._lines, self.connection = lines, connection
        self.beat_heard: Beat | None = None
        self.calls = self._calls_then = 0  # this router's calls, now and at the last beat

    def take(self, message: Message) -> None:
        if isinstance(message, Waits):
            raise Unavailable("sent a Waits, wanted what a cell says")
        if isinstance(message, Beat):
            self._lines.count(self, -1)
            self.beat_heard, self._calls_then = message, self.calls
            self._lines.count(self, 1)
            self._lines.on_beat()
            return
        call = self._lines.call(message.call)
        if call is not None:
            if isinstance(message, Placed) and call.line is None:
                call.line = self
                self.add(1)
            call.take(message)

    def add(self, calls: int) -> None:
        """Add so many of this router's calls."""
        self._lines.count(self, -1)
        self.calls += calls
        self._lines.count(self, 1)

    @property
    def load(self) -> int:
        """The requests that the cell holds: by its last beat, plus this router's own calls since."""
        beat = self.beat_heard
        return beat.running + beat.waiting + self.calls - self._calls_then if beat is not None else 0

    @property
    def is_full(self) -> bool:
        """Whether a new request would wait."""
        return self.beat_heard is not None and self.load >= self.beat_heard.slots

    def beat(self) -> Sequence[Waits]:
        return [self._lines.waits()]

    def lost(self, reason: str) -> None:
        self._lines.lose(self, FailureEvent(_ANY, Unavailable(f"the cell that served this request {reason}")))


@dataclass(slots=True)
class Sums:
    """Sums over all serving cells with a line here: their number, their slots, the requests that they hold, and `own`:
    this router's.

    They are updated by differences, because a router needs them with every request and beat, and there may be a
    thousand cells.
    A cell whose beat is late counts until it is lost, within three seconds: its requests keep their turns until then.
    Without its slots they would take up those of the others, which would stand idle.
    """

    cells: int = 0
    slots: int = 0
    held: int = 0
    own: int = 0


class CellLines:
    """Takes events from the connections of all cells and passes each to its call."""

    def __init__(self, silence_s: float = CELL_SILENCE_S) -> None:
        self._silence_s = silence_s
        self._calls: dict[int, Call] = {}
        self._keys = itertools.count()
        self._listener: Listener | None = None
        self._lines: set[CellLine] = set()
        self._lost: deque[str] = deque(maxlen=_REMEMBERED)
        self.sums = Sums()
        self.on_beat: Callable[[], None] = lambda: None
        self.waits: Callable[[], Waits] = lambda: Waits(0, 0.0)

    async def start(self, host: str) -> None:
        """Listen on `host`, an address of this machine that the cells reach. Raises ConfigError for wrong TLS files."""
        tls = line_tls.listening()
        self._listener = await listen(host, CODEC, self._accept, silence_s=self._silence_s, tls=tls)
        self.address = self._listener.address

    def beats(self) -> list[Beat]:
        """The last beat of each cell with a line here."""
        return [line.beat_heard for line in self._lines if line.beat_heard is not None]

    def living(self, mode: Mode | None = None) -> set[str]:
        """The cells with a line here that serve this mode, or any mode."""
        return {beat.cell for beat in self.beats() if (beat.modes if mode is None else mode in beat.modes)}

    def served(self) -> set[Mode]:
        """The modes that any cell with a line here serves."""
        return {mode for beat in self.beats() for mode in beat.serves}

    def unfit(self, mode: Mode) -> set[str]:
        """Cells that have lost their line, or do not serve this mode now. Serve may not know this yet."""
        there = {beat.cell for beat in self.beats()}
        return (there - self.living(mode)) | (set(self._lost) - there)

    def with_room(self, mode: Mode, fingerprint: str) -> set[str]:
        """The cells that serve this mode from this checkpoint and would start a request at once."""
        room = {beat.cell for beat in self.beats() if mode in beat.modes and beat.fingerprint == fingerprint}
        return room - self.full()

    def full(self) -> frozenset[str]:
        """The cells whose slots are all taken."""
        return frozenset(line.beat_heard.cell for line in self._lines if line.beat_heard is not None and line.is_full)

    def load(self) -> dict[str, int]:
        """The requests of each cell whose beats arrive in time."""
        heard = ((line.beat_heard, line) for line in self._lines if not line.connection.is_late)
        return {beat.cell: line.load for beat, line in heard if beat is not None}

    def count(self, line: CellLine, sign: int) -> None:
        """Count this line's cell as serving (1), or as not serving (-1)."""
        beat, sums = line.beat_heard, self.sums
        if beat is not None and beat.modes and line in self._lines:
            sums.cells += sign
            sums.slots += sign * beat.slots
            sums.held += sign * line.load
            sums.own += sign * line.calls

    def open(self, merging: bool) -> Call:
        """Open a call for events; `close` it at the end."""
        key = next(self._keys)
        call = self._calls[key] = Call(ReplyTo(self.address, key), merging)
        return call

    def call(self, key: int) -> Call | None:
        return self._calls.get(key)

    def is_open(self, call: Call) -> bool:
        return call.reply_to.call in self._calls

    def close(self, call: Call) -> None:
        """Drop later events of this call."""
        if self._calls.pop(call.reply_to.call, None) is not None and call.line is not None:
            call.line.add(-1)
        if not call.placed.cancel() and not call.placed.cancelled():
            call.placed.exception()  # somebody has seen it

    def stop(self) -> None:
        """Close the connection of every cell."""
        if self._listener is not None:
            self._listener.close()
        for line in list(self._lines):
            line.connection.close()

    def lose(self, line: CellLine, failure: FailureEvent) -> None:
        """The cell of this line is lost, and so are the calls that it has taken."""
        self.count(line, -1)
        self._lines.discard(line)
        if line.beat_heard is not None:
            self._lost.append(line.beat_heard.cell)
        for call in self._calls.values():
            if call.line is line:
                call.fail(failure)

    def _accept(self, connection: Connection[Message], about: About) -> tuple[CellLine, About]:
        line = CellLine(self, connection)
        self._lines.add(line)
        return line, {}
