"""An event loop whose clock jumps to the next timer: hours pass as fast as they can be computed.

The product's routers are coroutines. They run unchanged on this loop. So a simulation runs the policies themselves and
not a copy.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")
_ROUNDING = 1e-6


class NothingLeft(RuntimeError):
    """Every task waits, and no timer is set: nothing will ever happen again."""


class _NoSockets:
    """In the place of a selector. To wait for sockets is to let the time pass."""

    def __init__(self, loop: "VirtualLoop") -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise NothingLeft("every task waits, and no timer is set")
        if timeout > 0:
            self._loop.advance(timeout)
        return []

    def close(self) -> None:
        """There is nothing to close."""


class VirtualLoop(asyncio.BaseEventLoop):
    """`time` begins with 0. Threads and sockets have no place here."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = _NoSockets(self)
        self._seconds = 0.0

    def time(self) -> float:
        return self._seconds

    def advance(self, timeout: float) -> None:
        """To the next timer, exactly: sums of differences would drift."""
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        until = self._seconds + timeout
        self._seconds = min(timers[0].when(), until + _ROUNDING) if timers else until

    def _process_events(self, events: list[Any]) -> None:
        """None come."""

    def _write_to_self(self) -> None:
        """Nobody is to be woken up."""


def simulated(work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns, on a clock of its own."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()
