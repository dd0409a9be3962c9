"""How many requests a router holds, how many more it accepts, and when a refused one may try again.

Knows numbers and the clock; does not know what a request is.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.runs.callers import NOBODY, Caller
from twotower.errors import DeadlineExceeded, Overloaded, Unavailable

LEAST_HINT_S, MOST_HINT_S = 1.0, 60.0
_FIRST_GUESS_S, _GUESS_COUNTS = 8.0, 8.0  # first estimate of a request's time, and its weight in measurements
_FADING = 0.98  # a measurement's weight after the next one


class Admission:
    """Accepts requests up to `capacity`: those that the cells decode at once (`slots`), and those that may wait.

    Beyond it there is a reserve of an eighth for callers that hold less than their equal share of `capacity`. So a
    flooding caller is refused, and the next caller is not.
    """

    def __init__(self, capacity: int, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity, self._slots, self._clock = capacity, min(slots, capacity), clock
        self._reserve = max(1, capacity // 8)
        self._running = 0
        self._of_callers: Counter[Caller] = Counter()  # of callers that hold any
        self._closed = False
        self._nothing_runs = asyncio.Event()
        self._nothing_runs.set()
        # The time from one request's end to the next while all slots are taken: a sum of times over one of ends.
        self._ends, self._between_ends_s = _GUESS_COUNTS, _GUESS_COUNTS * _FIRST_GUESS_S / self._slots
        self._full_since: float | None = None
        self._ended_while_full = False
        self._promised = 0.0

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def most(self) -> int:
        """The greatest number of requests at a time, including the reserve."""
        return self._capacity + self._reserve

    @property
    def running(self) -> int:
        return self._running

    @property
    def closed(self) -> bool:
        """Whether it accepts no more requests."""
        return self._closed

    def fits(self, requests: int, caller: Caller = NOBODY) -> bool:
        running = self._running + requests
        if running <= self._capacity:
            return True
        own, callers = self._of_callers[caller] + requests, len(self._of_callers.keys() | {caller})
        return running <= self.most and own * callers <= self._capacity

    @contextmanager
    def hold(self, requests: int = 1, caller: Caller = NOBODY) -> Iterator[None]:
        """Hold room for these requests until the last byte of their answers.

        Raises Overloaded at once if they do not fit, and Unavailable once this router is closed. A cell's Overloaded
        also gets a hint.
        """
        self.check_open()
        if not self.fits(requests, caller):
            full = f"{self._running} requests are under way, wanted at most {self._capacity}"
            raise Overloaded(full, self._hint_s(requests))
        began, counts = self._clock(), True
        self._running += requests
        self._of_callers[caller] += requests
        self._nothing_runs.clear()
        if self._full_since is None and self._running >= self._slots:
            self._full_since, self._ended_while_full = began, False
        try:
            yield
        except Overloaded as error:
            counts = False
            if error.retry_after_s is None:
                error.retry_after_s = self._hint_s(requests)
            raise
        except DeadlineExceeded:
            raise  # it has run until its deadline
        except BaseException:
            counts = False  # it did not run to its end, so its time says nothing about others
            raise
        finally:
            self._leave(requests, caller, began if counts else None)

    def check_open(self) -> None:
        """Raises Unavailable once this router takes no more requests."""
        if self._closed:
            raise Unavailable("the service is shutting down")

    def close(self) -> None:
        """Accept no more requests; running ones continue."""
        self._closed = True

    async def nothing_runs(self, within_s: float) -> bool:
        """Waits at most so many seconds for the last request's end. Returns whether it has ended."""
        try:
            async with asyncio.timeout(within_s):
                await self._nothing_runs.wait()
        except TimeoutError:
            return False
        return True

    def _leave(self, requests: int, caller: Caller, began: float | None) -> None:
        if began is not None:
            self._measure(requests, began)
        self._running -= requests
        self._of_callers[caller] -= requests
        if not self._of_callers[caller]:
            del self._of_callers[caller]
        if self._running < self._slots:
            self._full_since, self._promised = None, 0.0  # there is room, so earlier promises no longer count
        if not self._running:
            self._nothing_runs.set()

    def _measure(self, requests: int, began: float) -> None:
        """Measure the pace of requests. Without a queue it is a request's time divided by all slots."""
        now = self._clock()
        passed_s = (now - began) * requests / self._slots if self._full_since is None else now - self._full_since
        self._ends = _FADING * self._ends + requests
        self._between_ends_s = _FADING * self._between_ends_s + passed_s
        self._full_since, self._ended_while_full = now, True

    def _hint_s(self, requests: int) -> float:
        """Seconds until there is room for these, after all requests that were told to try again before them."""
        now = self._clock()
        pace_s = first_s = self._between_ends_s / self._ends
        if self._full_since is not None and not self._ended_while_full:
            # All have begun together and will end together. If they should have ended by now, they take longer than
            # estimated.
            waited_s = now - self._full_since
            run_s = max(pace_s * self._slots, 2 * waited_s)
            pace_s, first_s = run_s / self._slots, run_s - waited_s
        self._promised = min(max(self._promised + requests * pace_s, now + first_s), now + MOST_HINT_S)
        return max(self._promised - now, LEAST_HINT_S)
