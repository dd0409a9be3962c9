"""The moment by which a request must end: set at its arrival, and passed to everything that works on it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from twotower.errors import DeadlineExceeded


@dataclass(frozen=True, slots=True)
class Deadline:
    """`limit_s` seconds, over at `ends_at` on the monotonic clock."""

    limit_s: float
    ends_at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """A deadline `seconds` from now: made at a request's first byte."""
        return cls(seconds, time.monotonic() + seconds)

    def left_s(self) -> float:
        """Seconds left, more than none. Raises DeadlineExceeded."""
        left = self.ends_at - time.monotonic()
        if left <= 0:
            raise self.passed()
        return left

    def passed(self) -> DeadlineExceeded:
        """The error once the time is over."""
        return DeadlineExceeded(f"not finished within {self.limit_s:g} s")

    @asynccontextmanager
    async def over(self) -> AsyncIterator[None]:
        """Cancels what is awaited inside once the time is over. Raises DeadlineExceeded then, or at once."""
        try:
            async with asyncio.timeout(self.left_s()) as timer:
                yield
        except TimeoutError:
            if not timer.expired():
                raise
            raise self.passed() from None
