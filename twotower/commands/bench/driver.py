"""Sends a load and notes when events arrive. Times are the event loop's, so that a test's loop can have its own clock.

Closed loop: a client sends its next request when its last one has ended. A slow service is asked less often, so the
latencies of such a load say nothing about a load that does not wait. Open loop: the time when a request is due is drawn
beforehand. Its latency counts from that time, even if it was sent late, because its user would have waited. Counting
from the sending is known as coordinated omission.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from random import Random
from typing import Protocol

from twotower.commands.bench.load import MAX_REQUESTS, Load
from twotower.commands.bench.samples import Pass, Sample
from twotower_client import Block, Event, Finished, ServiceError, Usage


class Streaming(Protocol):
    """Sends request `number` and yields the events of its answer."""

    def __call__(self, number: int) -> AbstractAsyncContextManager[AsyncIterator[Event]]: ...


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """When requests are due, in seconds from the beginning: a Poisson process, the same for the same seed."""
    random, at = Random(f"arrivals/{seed}"), 0.0
    while True:
        at += random.expovariate(rate)
        yield at


class Driver:
    """One pass. `told` is called with each sample. `most_at_once` bounds an open loop's running requests; a due request
    beyond the bound waits here, and the wait counts in its latency.
    """

    def __init__(
        self, send: Streaming, load: Load, seed: int, told: Callable[[Sample], object], most_at_once: int = 4096
    ) -> None:
        self._send, self._load, self._seed, self._told = send, load, seed, told
        self._places = asyncio.Semaphore(most_at_once)
        self._samples: list[Sample] = []
        self._next = self._in_flight = self._most_in_flight = 0
        self._began = 0.0

    async def run(self, mode: str | None, round_: int) -> Pass:
        cpu = time.process_time()
        self._began = asyncio.get_running_loop().time()
        if self._load.rate is not None:
            await self._open_loop(self._load.rate)
        else:
            async with asyncio.TaskGroup() as clients:
                for _ in range(self._load.clients or 1):
                    clients.create_task(self._closed_loop())
        return Pass(
            mode,
            self._load,
            round_,
            tuple(sorted(self._samples, key=lambda sample: sample.number)),
            max(self._now, 1e-9),
            self._most_in_flight,
            time.process_time() - cpu,
        )

    @property
    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    def _take(self, at: float) -> int | None:
        """The number of the next request, once it is due; None after the last."""
        load = self._load
        if self._next >= (load.requests or MAX_REQUESTS) or (load.seconds is not None and at >= load.seconds):
            return None
        self._next += 1
        return self._next - 1

    async def _closed_loop(self) -> None:
        while (number := self._take(self._now)) is not None:
            await self._one(number, self._now)

    async def _open_loop(self, rate: float) -> None:
        async with asyncio.TaskGroup() as requests:
            for due in arrivals(rate, self._seed):
                number = self._take(due)
                if number is None:
                    return
                await asyncio.sleep(due - self._now)
                requests.create_task(self._placed(number, due))

    async def _placed(self, number: int, due: float) -> None:
        async with self._places:
            await self._one(number, due)

    async def _one(self, number: int, due: float) -> None:
        sent, blocks, usage, error = self._now, list[float](), Usage(), None
        self._in_flight += 1
        self._most_in_flight = max(self._most_in_flight, self._in_flight)
        try:
            async with self._send(number) as events:
                async for event in events:
                    if isinstance(event, Block) and event.token_ids:
                        blocks.append(self._now)
                    elif isinstance(event, Finished):
                        usage = event.usage
        except ServiceError as failed:
            error = failed.code
        finally:
            self._in_flight -= 1
        sample = Sample(number, due, sent, self._now, tuple(blocks), usage, error)
        self._samples.append(sample)
        self._told(sample)
