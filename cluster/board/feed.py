"""The watchers of the ops page: one snapshot a second for all of them, none without watchers. A slow watcher is
dropped.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from cluster.board.board import Board
from cluster.board.part import Part
from cluster.board.siblings import Ask, nobody, parts_of
from cluster.board.whole import Snapshot, snapshot
from twotower.errors import Overloaded, Unavailable

logger = logging.getLogger(__name__)

MOST_WATCHERS = 32
PACE_S = 1.0
NEWS_S = 15  # seconds of points in each message, to include points that routers sent late
LIFE_S = 300.0  # lifetime of a stream; its reader then asks again, perhaps another router
_BEHIND = 3  # messages that a watcher has not read; then it is dropped


@dataclass(frozen=True, slots=True)
class Message:
    """A snapshot as JSON, and the second up to which its reader then knows everything."""

    at: int
    body: bytes

    @classmethod
    def of(cls, told: Snapshot) -> "Message":
        return cls(int(told.at), told.encoded())


class Watcher:
    """`snapshots` that have not been read yet; None is the last."""

    def __init__(self) -> None:
        self.snapshots: asyncio.Queue[Message | None] = asyncio.Queue()

    def give(self, message: Message) -> bool:
        """False if the watcher has fallen behind; it then gets nothing more."""
        if self.snapshots.qsize() >= _BEHIND:
            self.end()
            return False
        self.snapshots.put_nowait(message)
        return True

    def end(self) -> None:
        self.snapshots.put_nowait(None)


class Feed:
    """Snapshots of the whole service, from this router and the others. `leaves`: whether this router is being removed;
    open streams would delay that.
    """

    def __init__(self, board: Board, ask: Ask = nobody, leaves: Callable[[], bool] = lambda: False) -> None:
        self._board, self._ask, self._leaves = board, ask, leaves
        self._closed = False
        self._watchers: set[Watcher] = set()
        self._pushing: asyncio.Task[None] | None = None
        self._collecting: asyncio.Task[list[Part]] | None = None
        self._collected_at = -PACE_S

    async def adopt(self) -> None:
        """At the start: copy the histories of running routers, so that a deployment does not end them."""
        for part in await parts_of(self._ask, {}, self._board.name):
            self._board.hear(part.histories)

    async def now(self, since: int = 0) -> Snapshot:
        """Points and events from `since` on. With any number of callers the other routers are asked once a second."""
        return await self.put_together(await self.parts(), since)

    async def put_together(self, parts: list[Part], since: int) -> Snapshot:
        """A snapshot from all routers' parts, and the histories known here."""
        return await snapshot(parts, [self._board.history, *self._board.past.values()], since)

    async def watch(self, since: int = 0) -> AsyncGenerator[Message, None]:
        """Everything from `since` on, then the news once a second. Ends for a slow watcher, after LIFE_S, and when the
        router is removed. Raises Overloaded with too many watchers, and Unavailable once stopped.
        """
        if self._closed:
            raise Unavailable("the service is shutting down")
        if len(self._watchers) >= MOST_WATCHERS:
            raise Overloaded(f"{len(self._watchers)} watch the ops page of this router, wanted fewer", PACE_S)
        watcher = Watcher()
        self._watchers.add(watcher)
        if self._pushing is None or self._pushing.done():
            self._pushing = asyncio.create_task(self._push_while_watched())
        ends_at = time.monotonic() + LIFE_S
        try:
            yield Message.of(await self.now(since))
            while (message := await watcher.snapshots.get()) is not None and time.monotonic() < ends_at:
                yield message
        finally:
            self._watchers.discard(watcher)

    def stop(self) -> None:
        """Ends all streams and accepts no new ones."""
        self._closed = True
        for watcher in self._watchers:
            watcher.end()
        if self._pushing is not None:
            self._pushing.cancel()

    async def parts(self) -> list[Part]:
        """The parts of all routers, this one's first; never older than a second."""
        if self._collecting is None or time.monotonic() - self._collected_at >= PACE_S:
            self._collected_at = time.monotonic()
            self._collecting = asyncio.create_task(self._collect())
        return await asyncio.shield(self._collecting)

    async def _collect(self) -> list[Part]:
        board = self._board
        others = await parts_of(self._ask, board.known(), board.name)
        for part in others:
            board.hear(part.histories)
        return [board.part(board.known()), *others]

    async def _push_while_watched(self) -> None:
        while self._watchers:
            await asyncio.sleep(PACE_S)
            if self._leaves():
                for watcher in self._watchers:
                    watcher.end()
            try:
                message = Message.of(await self.now(int(self._board.now()) - NEWS_S))
            except Exception:
                logger.exception("a snapshot for the ops page is lost")
                continue
            self._watchers = {watcher for watcher in self._watchers if watcher.give(message)}
