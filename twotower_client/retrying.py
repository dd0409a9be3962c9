"""When a failed call is sent again. Decides; sends nothing and sleeps nowhere."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from twotower_client.errors import ServiceError

MAX_ATTEMPTS, MAX_PAUSE_S = 100, 3600.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Up to `attempts` in all. Before the next one the client waits for a random time. It is up to `first_s` after the
    first failure, `factor` times as long after each further one, and `longest_s` at most. The service's own hint is
    added to this time. If the hint is beyond `longest_hint_s`, the error is raised at once.

    `RetryPolicy(attempts=1)` never sends again.
    """

    attempts: int = 5
    first_s: float = 0.5
    factor: float = 2.0
    longest_s: float = 20.0
    longest_hint_s: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= MAX_ATTEMPTS:
            raise ValueError(f"attempts: got {self.attempts}, wanted a whole number from 1 to {MAX_ATTEMPTS}")
        if not 1 <= self.factor <= 10:
            raise ValueError(f"factor: got {self.factor}, wanted a number from 1 to 10")
        for name in ("first_s", "longest_s", "longest_hint_s"):
            value = getattr(self, name)
            if not 0 <= value <= MAX_PAUSE_S:
                raise ValueError(f"{name}: got {value}, wanted seconds, from 0 to {MAX_PAUSE_S:g}")

    def longest_pause_s(self, failures: int) -> float:
        """The longest pause after so many failures, without a hint of the service."""
        return min(self.longest_s, self.first_s * self.factor ** (failures - 1))


@dataclass(slots=True)
class Tries:
    """The attempts of one call. `ends_at`: its deadline by `clock`, if it has one."""

    policy: RetryPolicy
    timeout_s: float | None
    draw: Callable[[float, float], float] = random.uniform
    clock: Callable[[], float] = time.monotonic
    made: int = 0
    _ends_at: float | None = field(init=False)

    def __post_init__(self) -> None:
        self._ends_at = None if self.timeout_s is None else self.clock() + self.timeout_s

    def begin(self) -> float | None:
        """Begin one more attempt. Returns the seconds left for it; None without a deadline."""
        self.made += 1
        return None if self._ends_at is None else max(0.001, self._ends_at - self.clock())

    def pause_s(self, error: ServiceError, streamed: bool = False) -> float:
        """How long to wait before the next attempt. Raises the error if there is no further attempt. This is so if a
        retry cannot help, if something has been `streamed` already, or if attempts or time are used up.
        """
        error = error.after(self.made)
        hint_s = error.retry_after_s
        if streamed or not error.can_retry or self.made >= self.policy.attempts:
            raise error
        if hint_s is not None and hint_s > self.policy.longest_hint_s:
            raise error
        pause_s = (hint_s or 0.0) + self.draw(0.0, self.policy.longest_pause_s(self.made))
        if self._ends_at is not None and self.clock() + pause_s >= self._ends_at:
            raise error
        return pause_s
