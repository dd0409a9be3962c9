"""Whose request goes to the cells next while they are full: callers take turns.

Knows callers, priorities and how many requests the cells take at a time; does not know what a request is.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cluster.runs.callers import NOBODY, Caller
from cluster.runs.messages import Waits
from twotower.engine.ledger import MAX_PASSED
from twotower.errors import Unavailable

_UNBOUNDED = 1 << 30


@dataclass(slots=True, eq=False)
class _Waiting:
    """A waiting request, since when, and how many of a lower value have passed it."""

    priority: int
    since: float
    turn: "asyncio.Future[None]"
    passed: int = 0


class Turns:
    """Lets requests go to the cells, at most `most()` at a time; if that is 0, its last value.

    The next turn goes to the caller with the fewest requests on the cells; among several, to the one whose last turn is
    longest ago. So a flooding caller delays only itself. Among a caller's own requests, priorities count as in a cell's
    queue.
    """

    def __init__(
        self,
        most: Callable[[], int] = lambda: _UNBOUNDED,
        at_first: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._last_most, self._clock = most, at_first, clock
        self._lines: dict[Caller, list[_Waiting]] = {}  # only callers that wait
        self._running: Counter[Caller] = Counter()  # only callers that have any
        self._total = 0
        self._turns_given = 0
        self._last_turn: dict[Caller, int] = {}  # only callers that wait or have running requests

    def waits(self) -> Waits:
        """The waiting requests for the cells' load, so that further cells may start."""
        return Waits(self.waiting, self.longest_wait_s())

    @property
    def waiting(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def longest_wait_s(self) -> float:
        """The longest wait of the waiting requests."""
        since = [waiting.since for line in self._lines.values() for waiting in line]
        return self._clock() - min(since) if since else 0.0

    async def take(self, caller: Caller = NOBODY, priority: int = 0) -> None:
        """Wait for a turn; `give_back` it afterwards. Raises Unavailable after `refuse_all`."""
        waiting = _Waiting(priority, self._clock(), asyncio.get_running_loop().create_future())
        self._line_up(self._lines.setdefault(caller, []), waiting)
        self.grant()
        try:
            await waiting.turn
        except BaseException:
            turn = waiting.turn
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give_back(caller)  # left in the moment of its turn
            else:
                self._forget(caller, waiting)
            raise

    def take_again(self, caller: Caller = NOBODY) -> None:
        """Take a turn without waiting: the request has begun, and gave its turn back while cells could not serve it."""
        self._total += 1
        self._running[caller] += 1

    def give_back(self, caller: Caller = NOBODY) -> None:
        """A request with a turn needs the cells no more, or not now."""
        self._total -= 1
        self._running[caller] -= 1
        if not self._running[caller]:
            del self._running[caller]
        self.grant()
        self._drop(caller)

    def grant(self) -> None:
        """Give out turns while there is room. Call it whenever the cells may have more room."""
        self._last_most = self._most() or self._last_most
        while self._lines and self._total < self._last_most:
            caller = min(self._lines, key=lambda one: (self._running[one], self._last_turn.get(one, 0)))
            waiting = self._lines[caller].pop(0)
            if not self._lines[caller]:
                del self._lines[caller]
            self._turns_given += 1
            self._last_turn[caller] = self._turns_given
            if not waiting.turn.done():
                self._total += 1
                self._running[caller] += 1
                waiting.turn.set_result(None)

    def refuse_all(self, why: str) -> None:
        """All waiting requests end with Unavailable."""
        for line in list(self._lines.values()):
            for waiting in line:
                if not waiting.turn.done():
                    waiting.turn.set_exception(Unavailable(why))

    def _line_up(self, line: list[_Waiting], waiting: _Waiting) -> None:
        place = len(line)
        while place and waiting.priority < line[place - 1].priority and line[place - 1].passed < MAX_PASSED:
            place -= 1
            line[place].passed += 1
        line.insert(place, waiting)

    def _forget(self, caller: Caller, waiting: _Waiting) -> None:
        line = self._lines.get(caller, [])
        if waiting in line:
            line.remove(waiting)
            if not line:
                del self._lines[caller]
        self._drop(caller)

    def _drop(self, caller: Caller) -> None:
        if caller not in self._lines and caller not in self._running:
            self._last_turn.pop(caller, None)
