"""What holders of keys have under way at this router, and what is left of their tokens a minute.

Tokens are counted when a request ends: prompt and answer. So the last one may take more than was left, and the next
waits for it.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.runs.callers import Caller
from cluster.runs.observers import Observer
from cluster.runs.record import Record
from twotower.core import Request
from twotower.errors import InvalidRequest, Overloaded

CONCURRENT, TOKENS = LIMITS = ("concurrent_requests", "tokens_per_minute")
_SOON_S = 1.0


class LimitReached(Overloaded):
    """A key allows no more now. `key`: its name; `limit`: which of its limits."""

    def __init__(self, key: str, limit: str, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.key, self.limit = key, limit


class Allowances(Observer):
    """Refuses what a caller's limits do not allow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: Counter[str] = Counter()  # by caller's name, of those with such a limit that have any
        self._left: dict[str, tuple[float, float]] = {}  # tokens, and when that was so

    @contextmanager
    def hold(self, requests: int, caller: Caller) -> Iterator[None]:
        """For as long as these are under way. Raises LimitReached; InvalidRequest for more than may ever be."""
        self._check_tokens(caller)
        most, running = caller.limits.concurrent_requests, self._running[caller.name] + requests
        if most is not None and requests > most:
            raise InvalidRequest.of("prompt", f"got {requests} at a time, wanted at most {most} with this key")
        if most is not None and running > most:
            told = f"{running} requests at a time with this key, wanted at most {most}"
            raise LimitReached(caller.name, CONCURRENT, told, _SOON_S)
        self._running[caller.name] = running
        try:
            yield
        finally:
            self._running[caller.name] -= requests
            if not self._running[caller.name]:
                del self._running[caller.name]

    def check_priority(self, priority: int, caller: Caller) -> None:
        """Raises InvalidRequest."""
        least = caller.limits.priority_from
        if least is not None and priority < least:
            raise InvalidRequest.of("priority", f"got {priority}, wanted at least {least} with this key")

    def ended(self, record: Record, error: BaseException | None) -> None:
        caller = record.caller
        rate = caller.limits.tokens_per_minute
        if rate is not None and record.attempts:
            self._left[caller.name] = (self._tokens_left(caller.name, rate) - _tokens_of(record), self._clock())

    def _check_tokens(self, caller: Caller) -> None:
        rate = caller.limits.tokens_per_minute
        if rate is None:
            return
        left = self._tokens_left(caller.name, rate)
        if left <= 0:
            told = f"the {rate} tokens a minute of this key are used up"
            raise LimitReached(caller.name, TOKENS, told, (1 - left) / rate * 60)

    def _tokens_left(self, name: str, rate: int) -> float:
        """As many come each minute; no more than those of one minute are kept."""
        left, at = self._left.get(name, (float(rate), self._clock()))
        return min(float(rate), left + (self._clock() - at) * rate / 60)


def _tokens_of(record: Record) -> int:
    request = record.request
    if isinstance(request, Request):
        return len(request.prompt_token_ids) + record.usage.completion_tokens
    return len(request.token_ids)
