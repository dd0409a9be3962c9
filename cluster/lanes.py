"""Threads for work that would hold up a router's loop: short pieces never wait behind long ones."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cluster.deadline import Deadline

INLINE_S, SHORT_S = 0.002, 0.05

Result = TypeVar("Result")


class Lanes:
    """One thread for pieces of some milliseconds, one for longer ones. Each takes its pieces in their order."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, "short-lane")
        self._long = ThreadPoolExecutor(1, "long-lane")

    async def run(self, expected_s: float, work: Callable[[], Result], deadline: Deadline) -> Result:
        """The result of `work`, done at once where it is hardly any. Raises DeadlineExceeded, and then `work` is left
        out if it has not begun.
        """
        async with deadline.over():
            if expected_s <= INLINE_S:
                await asyncio.sleep(0)  # many small pieces in a row hold the loop up too
                return work()
            lane = self._short if expected_s <= SHORT_S else self._long
            return await asyncio.get_running_loop().run_in_executor(lane, work)
