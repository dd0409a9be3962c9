"""Where a request's events wait for their reader. Asynchronous, within one event loop."""

import asyncio
from collections import deque

from twotower.core import BlockEvent, FailureEvent, ToldEvent


class Inbox:
    """Events of one request that its reader has not taken yet. Nothing follows a failure."""

    def __init__(self, merging: bool) -> None:
        self._events: deque[ToldEvent | FailureEvent] = deque()
        self._arrived = asyncio.Event()
        self._merging = merging
        self._failed = False

    def put(self, event: ToldEvent | FailureEvent) -> None:
        if not self._failed:
            self._failed = isinstance(event, FailureEvent)
            self._events.append(event)
            self._arrived.set()

    async def get(self) -> ToldEvent | FailureEvent:
        """The next event; with `merging`, merged with the blocks that a slow reader has left waiting."""
        await self._arrived.wait()
        event = self._events.popleft()
        while self._merging and isinstance(event, BlockEvent) and self._events:
            following = self._events[0]
            if not isinstance(following, BlockEvent):
                break
            self._events.popleft()
            event = event.joined(following)
        if not self._events:
            self._arrived.clear()
        return event
