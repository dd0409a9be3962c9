"""An order of streams whose threads learn from each other wherever our links hand something over."""

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import pytest

from tests.stream_order import Clock, Ordering, join
from twotower.exchange import distributed_link, distributed_port, endpoint, staging
from twotower.exchange.messages import CODEC, Heartbeat, Message


@contextmanager
def kept(patch: pytest.MonkeyPatch) -> Iterator[Ordering]:
    """At its end nothing may have been out of order."""
    order = Ordering()
    start, run, join_thread = threading.Thread.start, threading.Thread.run, threading.Thread.join

    class HandedOver(deque[Any]):
        def append(self, item: Any) -> None:
            self.clock: Clock = getattr(self, "clock", {})
            join(self.clock, order.host)
            super().append(item)

        def popleft(self) -> Any:
            item = super().popleft()
            order.host_waits(getattr(self, "clock", {}))
            return item

    class HandedQueue:
        def __init__(self) -> None:
            self._items: SimpleQueue[tuple[Any, Clock]] = SimpleQueue()

        def put(self, item: Any) -> None:
            self._items.put((item, dict(order.host)))

        def _known(self, given: tuple[Any, Clock]) -> Any:
            order.host_waits(given[1])
            return given[0]

        def get(self, timeout: float) -> Any:
            return self._known(self._items.get(timeout=timeout))

        def get_nowait(self) -> Any:
            return self._known(self._items.get_nowait())

    class KnownMirror(distributed_link._Mirror):
        """By `read` the engine's thread tells the receiver's that its pass has ended, and so all that it knows."""

        @property
        def read(self) -> bool:
            value, clock = self._said
            order.host_waits(clock)
            return value

        @read.setter
        def read(self, value: bool) -> None:
            self._said = value, dict(order.host)  # in one assignment: no other thread sees one without the other

    def join_knowing(thread: threading.Thread, timeout: float | None = None) -> None:
        join_thread(thread, timeout)
        if not thread.is_alive():
            order.host_waits(thread.known)  # type: ignore[attr-defined]

    def start_knowing(thread: threading.Thread) -> None:
        thread.known = dict(order.host)  # type: ignore[attr-defined]
        start(thread)

    def run_knowing(thread: threading.Thread) -> None:
        order.host_waits(thread.known)  # type: ignore[attr-defined]
        try:
            run(thread)
        finally:
            thread.known = dict(order.host)  # type: ignore[attr-defined]

    body, number = endpoint._body, itertools.count()

    def said(messages: Sequence[Message]) -> bytes:
        return order.said(body([*messages, Heartbeat(next(number))]))  # no two frames alike

    patch.setattr(endpoint, "_body", said)
    patch.setattr(endpoint.MessageStream, "receive", lambda stream: CODEC.decode(order.heard(stream.channel.receive())))
    patch.setattr(endpoint, "SimpleQueue", HandedQueue)
    patch.setattr(distributed_link, "_Mirror", KnownMirror)
    for module in (staging, distributed_link, distributed_port):
        patch.setattr(module, "deque", HandedOver)
    patch.setattr(threading.Thread, "start", start_knowing)
    patch.setattr(threading.Thread, "run", run_knowing)
    patch.setattr(threading.Thread, "join", join_knowing)
    try:
        yield order
    finally:
        order.over = True
    assert not order.faults, order.faults
