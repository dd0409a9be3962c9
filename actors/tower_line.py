"""The tower process's end of the line to its cell."""

import asyncio
import logging
from collections.abc import Sequence

from actors.line import LINE, SILENCE_S, Add, Cancel, Ended, Instruction, News, Score
from twotower.core import Event, FailureEvent, ReleasedEvent
from twotower.engine.runner import EngineRunner
from twotower.errors import TwoTowerError, Unavailable
from twotower.transport.connection import Connection, Listener, TooLarge, listen
from twotower.transport.handshake import About, Address

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"  # a cell's processes share a node


class TowerLine:
    """Waits for the cell, then serves it until one of them ends. Lives on the process's event loop."""

    def __init__(self, runner: EngineRunner, timeout_s: float) -> None:
        self._runner, self._timeout_s = runner, timeout_s
        self._listener: Listener | None = None
        self._line: Connection[Instruction | News] | None = None

    async def open(self) -> Address:
        """The address for the cell's only connection."""
        if self._listener is not None:
            raise Unavailable("this tower has been asked for its line before")
        self._loop = asyncio.get_running_loop()
        self._listener = await listen(_HOST, LINE, self._accept, silence_s=min(SILENCE_S, self._timeout_s))
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
        """Reports that the engine lives, too: a loop may live beside a hung engine."""
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
                return  # there is no receiver left


def _failed(news: News) -> News:
    """Replaces an answer that is too large for a frame."""
    if isinstance(news, Ended):
        return Ended("its reason is too long to be told")
    return FailureEvent(news.request_id, TwoTowerError("its answer is too large for one message"))
