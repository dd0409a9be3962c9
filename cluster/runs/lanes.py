"""Threads for work that would block a router's loop: short pieces never wait behind long ones."""

import asyncio
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Generic, TypeVar

from cluster.runs.deadline import Deadline
from twotower.errors import Overloaded

INLINE_S, SHORT_S = 0.002, 0.05
MAX_PIECES = 256  # pieces of one lane, including the current one

Result = TypeVar("Result")


class Lanes:
    """One thread for pieces of some milliseconds, one for longer ones. Each takes its pieces in their order."""

    def __init__(self) -> None:
        self._short, self._long = Lane("short-lane"), Lane("long-lane")

    async def run(self, expected_s: float, work: Callable[[], Result], deadline: Deadline) -> Result:
        """The result of `work`; tiny work is done at once.

        Raises DeadlineExceeded, and then `work` is left out if it has not begun; Overloaded.
        """
        async with deadline.over():
            if expected_s <= INLINE_S:
                await asyncio.sleep(0)  # many small pieces in a row block the loop, too
                return work()
            return await (self._short if expected_s <= SHORT_S else self._long).run(work)


class Lane:
    """One thread, and the pieces of work that wait for it."""

    def __init__(self, name: str) -> None:
        self._name, self._thread = name, ThreadPoolExecutor(1, name)
        self.pieces = 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """Raises Overloaded if too many wait. A caller that is cancelled while `work` waits drops it at once."""
        if self.pieces >= MAX_PIECES:
            raise Overloaded(f"{self.pieces} pieces of work are in the {self._name}, wanted fewer than {MAX_PIECES}")
        piece = _Piece(work)
        self.pieces += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, piece)
        finally:
            self.pieces -= 1
            piece.drop()


class _Piece(Generic[Result]):
    """Work that can be dropped. An executor keeps even cancelled work until its thread reaches it."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work: Callable[[], Result] | None = work

    def __call__(self) -> Result:
        work = self._work
        if work is None:
            raise CancelledError
        return work()

    def drop(self) -> None:
        self._work = None
