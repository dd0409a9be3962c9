"""The running requests of each key at this router, and the rest of its tokens a minute.

The number of an answer's tokens is not known beforehand. A running request counts with the most it may take; its real
tokens are counted when it ends.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.runs.callers import Caller
from cluster.runs.observers import Observer
from cluster.runs.record import Record
from twotower.core import Request
from twotower.errors import InvalidRequest, Overloaded

CONCURRENT, TOKENS = LIMITS = ("concurrent_requests", "tokens_per_minute")
_SOON_S = 1.0


class LimitReached(Overloaded):
    """A limit of a key is reached. `key`: its name; `limit`: which of its limits."""

    def __init__(self, key: str, limit: str, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.key, self.limit = key, limit


@dataclass(frozen=True, slots=True)
class Wish:
    """What a call wants: so many requests at a time, and tokens of prompts and answers at most."""

    requests: int = 1
    tokens: int = 0


@dataclass(slots=True)
class _Account:
    """One key's running requests, and the tokens left at the time `at`."""

    requests: int = 0
    tokens: int = 0
    left: float = 0.0
    at: float = 0.0


class Allowances(Observer):
    """Refuses what a caller's limits do not allow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}  # by name, of keys with such a limit

    @contextmanager
    def hold(self, wish: Wish, caller: Caller) -> Iterator[None]:
        """Hold the limits while these requests run. Raises LimitReached, and InvalidRequest if waiting cannot help.

        The limits here are a router's parts. A call within the whole limit may exceed the part. Then no other request
        of its key may run, and the part of the tokens must be unused.
        """
        limits = caller.limits
        if limits.concurrent_requests is None and limits.tokens_per_minute is None:
            yield
            return
        _check(wish, caller)
        account = self._account(caller)
        self._check_requests(wish, account, caller)
        self._check_tokens(wish, account, caller)
        account.requests += wish.requests
        account.tokens += wish.tokens
        try:
            yield
        finally:
            account.requests -= wish.requests
            account.tokens -= wish.tokens

    def check_priority(self, priority: int, caller: Caller) -> None:
        """Raises InvalidRequest."""
        least = caller.limits.priority_from
        if least is not None and priority < least:
            raise InvalidRequest.of("priority", f"got {priority}, wanted at least {least} with this key")

    def ended(self, record: Record, error: BaseException | None) -> None:
        if record.caller.limits.tokens_per_minute is not None and record.attempts:
            self._account(record.caller).left -= _tokens_of(record)

    def _check_requests(self, wish: Wish, account: _Account, caller: Caller) -> None:
        most, requests = caller.limits.concurrent_requests, account.requests + wish.requests
        if most is not None and account.requests and requests > most:
            told = f"{requests} requests at a time with this key, wanted at most {most} here"
            raise LimitReached(caller.name, CONCURRENT, told, _SOON_S)

    def _check_tokens(self, wish: Wish, account: _Account, caller: Caller) -> None:
        rate = caller.limits.tokens_per_minute
        if rate is None:
            return
        free, wanted = account.left - account.tokens, min(wish.tokens, rate)
        if wanted > free:
            told = f"{max(0, int(free))} of this key's {rate} tokens a minute are left here, wanted {wish.tokens}"
            raise LimitReached(caller.name, TOKENS, told, max(_SOON_S, (wanted - free) / rate * 60))

    def _account(self, caller: Caller) -> _Account:
        """The account now: it gets the tokens of a minute each minute, and keeps at most the tokens of one minute."""
        rate, now = float(caller.limits.tokens_per_minute or 0), self._clock()
        account = self._accounts.get(caller.name)
        if account is None:
            account = self._accounts[caller.name] = _Account(left=rate, at=now)
        account.left, account.at = min(rate, account.left + (now - account.at) * rate / 60), now
        return account


def _check(wish: Wish, caller: Caller) -> None:
    """Raises InvalidRequest for more than the key can ever allow."""
    whole = caller.limits.whole
    if whole is None:
        return
    requests, tokens = whole
    if requests is not None and wish.requests > requests:
        raise InvalidRequest.of("prompt", f"got {wish.requests} at a time, wanted at most {requests} with this key")
    if tokens is not None and wish.tokens > tokens:
        told = f"got {wish.tokens} tokens of prompts and answers at most, wanted no more than {tokens} with this key"
        raise InvalidRequest.of("max_new_tokens", told)


def _tokens_of(record: Record) -> int:
    request = record.request
    if isinstance(request, Request):
        return len(request.prompt_token_ids) + record.usage.completion_tokens
    return len(request.token_ids)
