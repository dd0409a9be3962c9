"""One thing at a time: a device that runs passes, or an interpreter that requests share."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple


class Work(NamedTuple):
    """`count` passes of `each` seconds in a row. `done` is told how many were made."""

    each: float
    count: int
    done: Callable[[int], None]


class Device:
    """Asks `pick` what to do next whenever it is free, and sleeps while that says None. Call `poke` when there may be
    work. A series of passes ends after the running one, so that a new request takes part in the next.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, pick: Callable[[], Work | None]) -> None:
        self._loop, self._pick = loop, pick
        self._timer: asyncio.TimerHandle | None = None
        self._work = Work(0.0, 0, lambda count: None)
        self._began, self._ending, self._stopped = 0.0, False, False
        self.busy_s = self.passes = 0.0

    def poke(self) -> None:
        if self._stopped or self._ending:
            return
        if self._timer is None:
            self._start()
        elif self._work.count > 1:
            made = int((self._loop.time() - self._began) / self._work.each) + 1
            if made < self._work.count:
                self._timer.cancel()
                self._work = self._work._replace(count=made)
                self._timer = self._loop.call_at(self._began + made * self._work.each, self._end)

    def stop(self) -> None:
        """For ever, in the middle of what it does."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def _start(self) -> None:
        work = self._pick()
        if work is not None:
            self._work, self._began = work, self._loop.time()
            self._timer = self._loop.call_at(self._began + work.each * work.count, self._end)

    def _end(self) -> None:
        each, count, done = self._work
        self.busy_s += each * count
        self.passes += count
        self._timer, self._ending = None, True
        done(count)
        self._ending = False
        if not self._stopped and self._timer is None:
            self._start()


class Processor:
    """Serves in the order of arrival, one at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._free_at = 0.0
        self.busy_s = 0.0

    async def use(self, seconds: float) -> None:
        """Wait for one's turn, and take so long."""
        if seconds > 0:
            self.add(seconds)
            await asyncio.sleep(self._free_at - self._loop.time())

    def add(self, seconds: float) -> None:
        """To be done by and by: who comes later waits for it."""
        self._free_at = max(self._loop.time(), self._free_at) + seconds
        self.busy_s += seconds
