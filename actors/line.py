"""The line between a cell and a tower process: requests go in, events come out, over one loopback connection.

Ray starts, places and ends the processes, but events do not go through it: a call of Ray's costs the tower's
interpreter milliseconds, as much as a small model's forward; a message costs some tens of microseconds.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from twotower.core import (
    AnyRequest,
    BlockEvent,
    Event,
    FailureEvent,
    ReleasedEvent,
    Request,
    RequestId,
    RoundEvent,
    ScoreEvent,
    ScoreRequest,
    StepEvent,
)
from twotower.engine.runner import EngineRunner
from twotower.errors import TwoTowerError, Unavailable
from twotower.transport.codec import Codec
from twotower.transport.connection import Connection, Listener, TooLarge, listen
from twotower.transport.handshake import About, Address

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"  # a cell's processes share a node
SILENCE_S = 3.0  # at most, whatever the link's patience: then the other end is taken for dead


@dataclass(frozen=True, slots=True)
class Add:
    """Decode this request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Score:
    """Score this one."""

    request: ScoreRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give this one up."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine is gone; nothing follows."""

    reason: str


Instruction = Add | Score | Cancel
News = Event | Ended
LINE: Codec[Instruction | News] = Codec(
    Add, Score, Cancel, BlockEvent, ScoreEvent, StepEvent, RoundEvent, FailureEvent, ReleasedEvent, Ended
)


def instruction_of(request: AnyRequest) -> Instruction:
    """What makes a tower process start on it."""
    return Score(request) if isinstance(request, ScoreRequest) else Add(request)


class TowerLine:
    """The tower's end: waits for the cell, then serves it until either is gone. Lives on the process's event loop."""

    def __init__(self, runner: EngineRunner, timeout_s: float) -> None:
        self._runner, self._timeout_s = runner, timeout_s
        self._listener: Listener | None = None
        self._line: Connection[Instruction | News] | None = None

    async def open(self) -> Address:
        """Where the cell is to connect, once."""
        if self._listener is not None:
            raise Unavailable("this tower has been asked for its line before")
        self._loop = asyncio.get_running_loop()
        self._listener = await listen(HOST, LINE, self._accept, silence_s=min(SILENCE_S, self._timeout_s))
        return self._listener.address

    def _accept(self, connection: Connection[Instruction | News], about: About) -> tuple["TowerLine", About]:
        if self._line is not None:
            raise Unavailable("this tower has a line to its cell")
        assert self._listener is not None
        self._line = connection
        self._listener.close()
        self._loop.call_soon(self._runner.push_to, self._push)  # once the cell has been welcomed
        return self, {}

    def take(self, message: Instruction | News) -> None:
        match message:
            case Cancel(request_id):
                self._runner.cancel([request_id])
            case Add(request) | Score(request):
                try:
                    self._runner.add([request])
                except TwoTowerError as error:
                    self._send([FailureEvent(request.id, error), ReleasedEvent(request.id)])
            case _:
                raise Unavailable(f"sent a {type(message).__name__}, wanted an instruction")

    def beat(self) -> Sequence[News]:
        """That the engine lives, too: a loop lives on beside a hung engine."""
        try:
            self._runner.check()
        except Unavailable as error:
            return [Ended(str(error))]
        return ()

    def lost(self, reason: str) -> None:
        logger.error("the line to the cell broke: the cell %s", reason)

    def _push(self, events: Sequence[Event], failure: str | None) -> None:
        """From the engine's thread."""
        news = [*events] if failure is None else [*events, Ended(failure)]
        try:
            self._loop.call_soon_threadsafe(self._send, news)
        except RuntimeError:
            logger.debug("events for a closed event loop")

    def _send(self, news: Sequence[News]) -> None:
        assert self._line is not None
        for message in news:
            try:
                self._line.post(message)
            except TooLarge:
                self._line.post(_failed(message))
            except Unavailable:
                return  # nobody is left to tell


def _failed(news: News) -> News:
    """Instead of an answer that no frame can hold."""
    if isinstance(news, Ended):
        return Ended("its reason is too long to be told")
    return FailureEvent(news.request_id, TwoTowerError("its answer is too large for one message"))
