"""What every candidate implements: a cell's end that answers runs, a router's end that asks many over one connection.

A run is a `Request`; its answer is `BlockEvent`s and then one `ReleasedEvent`, its end. Knows no bytes.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from twotower.core import BlockEvent, ReleasedEvent, Request

Answer = BlockEvent | ReleasedEvent
Emit = Callable[[Answer], Awaitable[None]]
Answerer = Callable[[Request, Emit], Awaitable[None]]

BEAT_S = 1.0
SILENCE_S = 3.0
BOUND = 4096  # events that wait for one run's reader: more than one read of a socket brings at once


class Gone(Exception):
    """The connection or this run's stay on it is over; the message says why."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """A certificate and its key, where a candidate encrypts."""

    certificate: Path
    key: Path


class Asker(Protocol):
    """The router's end of one connection."""

    def ask(self, run: int, request: Request) -> AsyncIterator[Answer]:
        """The answer to the end. Raises Gone."""
        ...

    async def close(self) -> None: ...


class Server(Protocol):
    """The cell's end. `lost` says once that a router is gone."""

    async def serve(self, answer: Answerer, lost: Callable[[str], None], secrets: Secrets | None) -> str:
        """Listen; returns where."""
        ...


class Connector(Protocol):
    async def __call__(self, address: str, secrets: Secrets | None) -> Asker: ...


class Inbox:
    """Events of one run until its reader takes them: at most `bound`, or the run is given up."""

    def __init__(self, bound: int | None) -> None:
        self._events: deque[Answer] = deque()
        self._arrived = asyncio.Event()
        self._bound, self.failure = bound, ""

    def put(self, event: Answer) -> bool:
        """False where the reader has been too slow."""
        if self._bound is not None and len(self._events) >= self._bound:
            self.fail(f"{self._bound} events wait for its reader")
            return False
        self._events.append(event)
        self._arrived.set()
        return True

    def fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self._arrived.set()

    async def get(self) -> Answer:
        await self._arrived.wait()
        if self._events:
            event = self._events.popleft()
            if not self._events and not self.failure:
                self._arrived.clear()
            return event
        raise Gone(self.failure)


class Runs:
    """The router's half of a connection that carries many runs."""

    def __init__(
        self, send: Callable[[int, Request], None], cancel: Callable[[int], None], bound: int | None = BOUND
    ) -> None:
        self._send, self._cancel, self._bound = send, cancel, bound
        self._inboxes: dict[int, Inbox] = {}
        self._lost = ""

    async def ask(self, run: int, request: Request) -> AsyncIterator[Answer]:
        if self._lost:
            raise Gone(self._lost)
        inbox = self._inboxes[run] = Inbox(self._bound)
        try:
            self._send(run, request)
            while True:
                event = await inbox.get()
                yield event
                if isinstance(event, ReleasedEvent):
                    return
        finally:
            self._inboxes.pop(run, None)

    def take(self, run: int, event: Answer) -> None:
        inbox = self._inboxes.get(run)
        if inbox is not None and not inbox.put(event):
            self._inboxes.pop(run, None)
            self._cancel(run)

    def lose(self, reason: str) -> None:
        self._lost = self._lost or reason
        for inbox in self._inboxes.values():
            inbox.fail(self._lost)


class Desk:
    """The cell's half: a task for every run, all ended when the router is gone."""

    def __init__(self, answer: Answerer, lost: Callable[[str], None]) -> None:
        self._answer, self._lost = answer, lost
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def open(self, run: int, request: Request, emit: Emit) -> None:
        task = asyncio.ensure_future(self._answer(request, emit))
        self._tasks[run] = task
        task.add_done_callback(lambda _: self._tasks.pop(run))

    def cancel(self, run: int) -> None:
        if run in self._tasks:
            self._tasks[run].cancel()

    def lose(self, reason: str) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._lost(reason)
