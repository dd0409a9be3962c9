"""Clients of a service: what each asked and what became of it. Closed loops, and arrivals that nothing slows."""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twotower_client import AsyncClient, Block, Overloaded, RetryPolicy, ServiceError
from twotower_client.asking import Params, Prompt

ANSWERED, REFUSED = "answered", "refused"
_MOST_AT_A_TIME = 2000  # streams of arrivals
_CLIENTS = 4  # each with a connection of its own
_LONGEST_S = 150.0  # a phase


@dataclass(slots=True)
class Asked:
    """One request. Times in seconds since the load began; `outcome` is a gRPC code where it failed."""

    began: float
    first: float | None = None
    ended: float = float("inf")
    outcome: str = "under way"
    hint_s: float | None = None

    @property
    def latency_s(self) -> float:
        return self.ended - self.began

    @property
    def is_cut(self) -> bool:
        """Whether its stream began and did not reach its end."""
        return self.first is not None and self.outcome not in (ANSWERED, "under way")


class Load:
    """Asks one service the same kind of request, and remembers all."""

    def __init__(self, address: str, prompt: Prompt, params: Params) -> None:
        """`address`: of the gRPC face."""
        self._prompt, self._params, self._zero = prompt, params, time.monotonic()
        once = RetryPolicy(attempts=1)
        self._clients = [AsyncClient(f"grpc://{address}", retry=once, timeout_s=300) for _ in range(_CLIENTS)]
        self._turns = itertools.cycle(self._clients)
        self.asked: list[Asked] = []

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    def now(self) -> float:
        return time.monotonic() - self._zero

    async def ask(self) -> Asked:
        asked = Asked(self.now())
        self.asked.append(asked)
        try:
            async with next(self._turns).stream(self._prompt, **self._params) as events:
                async for event in events:
                    if asked.first is None and isinstance(event, Block):
                        asked.first = self.now()
            asked.outcome = ANSWERED
        except ServiceError as error:
            asked.outcome = REFUSED if isinstance(error, Overloaded) else error.code
            asked.hint_s = error.retry_after_s
        finally:
            asked.ended = self.now()
        return asked

    async def clients(self, number: int, seconds: float, more: Callable[[], bool] = lambda: False) -> None:
        """So many clients, each asking again once it is answered, for so long, and longer while there is `more` to see.
        A refused client asks again after half a second.
        """
        until, last = self.now() + seconds, self.now() + _LONGEST_S

        async def client() -> None:
            while self.now() < until or (more() and self.now() < last):
                if (await self.ask()).outcome != ANSWERED:
                    await asyncio.sleep(0.5)

        await asyncio.gather(*(client() for _ in range(number)))

    async def arrivals(self, per_second: float, seconds: float) -> None:
        """Requests at this rate, whatever becomes of them; done once the last has ended."""
        began, tasks, under_way = self.now(), set[asyncio.Task[Any]](), 0
        for number in range(round(per_second * seconds)):
            await asyncio.sleep(max(0.0, began + number / per_second - self.now()))
            under_way = sum(not task.done() for task in tasks) if number % 100 == 0 else under_way
            if under_way < _MOST_AT_A_TIME:
                tasks.add(asyncio.create_task(self.ask()))
        await asyncio.gather(*tasks)


def between(asked: Sequence[Asked], began: float, ended: float) -> list[Asked]:
    """Those that were asked in this time."""
    return [one for one in asked if began <= one.began < ended]


def answered(asked: Sequence[Asked]) -> list[Asked]:
    return [one for one in asked if one.outcome == ANSWERED]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many are not above."""
    if not values:
        return float("nan")
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
