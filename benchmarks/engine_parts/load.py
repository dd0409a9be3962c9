"""Clients of a pair: closed loops that keep a number of requests under way, and requests that come at random."""

import asyncio
import statistics
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from twotower.core import BlockEvent, Mode, Request

TIMEOUT_S = 300.0


class Source(Protocol):
    """Where answers come from: a `Pair`."""

    def generate(self, request: Request, timeout_s: float | None = None) -> AsyncGenerator[BlockEvent, None]: ...


@dataclass(slots=True)
class Answer:
    """One request's events and when each came, by `time.monotonic`."""

    request: Request
    asked: float
    events: list[BlockEvent] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for event in self.events for token in event.token_ids)

    @property
    def num_steps(self) -> int:
        return sum(event.num_steps for event in self.events)

    def gaps_per_step(self) -> list[float]:
        """Seconds between committed blocks, divided by the steps the later one took."""
        times = zip(self.arrivals, self.arrivals[1:], self.events[1:], strict=False)
        return [(after - before) / event.num_steps for before, after, event in times if event.num_steps]


@dataclass(frozen=True, slots=True)
class Run:
    """Answers in the order of the requests. `steady`: when all clients were busy."""

    answers: tuple[Answer, ...]
    started: float
    ended: float
    steady: tuple[float, float]

    @property
    def tokens_per_s(self) -> float:
        return sum(len(answer.token_ids) for answer in self.answers) / (self.ended - self.started)

    @property
    def steady_tokens_per_s(self) -> float:
        """Of the time when all clients were busy; of the whole run where that is too short to tell."""
        first, last = self.steady
        inside = [
            (at, len(event.token_ids))
            for answer in self.answers
            for at, event in zip(answer.arrivals, answer.events, strict=True)
            if first < at <= last
        ]
        if last - first < 0.5 * (self.ended - self.started):
            return self.tokens_per_s
        return sum(tokens for _, tokens in inside) / (last - first)

    @property
    def mean_steps(self) -> float:
        return statistics.fmean(answer.num_steps for answer in self.answers)


async def ask(source: Source, request: Request) -> Answer:
    answer = Answer(request, time.monotonic())
    async for event in source.generate(request, TIMEOUT_S):
        answer.events.append(event)
        answer.arrivals.append(time.monotonic())
    return answer


async def closed_loop(source: Source, requests: Sequence[Request], concurrency: int) -> Run:
    """Each of `concurrency` clients asks, reads to the end and asks again, until the requests are gone."""
    answers: dict[int, Answer] = {}
    waiting = deque(enumerate(requests))
    first_dry = [0.0]

    async def client() -> None:
        while waiting:
            number, request = waiting.popleft()
            answers[number] = await ask(source, request)
        first_dry[0] = first_dry[0] or time.monotonic()

    started = time.monotonic()
    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(client())
    ordered = tuple(answers[number] for number in range(len(requests)))
    all_busy = max((answer.arrivals[0] for answer in ordered[:concurrency]), default=started)
    return Run(ordered, started, time.monotonic(), (all_busy, first_dry[0]))


async def random_arrivals(source: Source, requests: Sequence[Request], concurrency: int, seed: int) -> Run:
    """As `closed_loop`, but every client waits up to a fifth of its last answer's time before it asks."""
    rng = Random(seed)
    answers: list[Answer] = []
    waiting = deque(requests)

    async def client() -> None:
        pause = rng.random() * 0.2
        while waiting:
            await asyncio.sleep(pause)
            if not waiting:
                return
            answer = await ask(source, waiting.popleft())
            answers.append(answer)
            pause = rng.random() * 0.2 * (time.monotonic() - answer.asked)

    started = time.monotonic()
    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(client())
    return Run(tuple(answers), started, time.monotonic(), (started, started))


def diffusion_gaps(run: Run) -> list[float]:
    """`gaps_per_step` of all diffusion answers."""
    answers = (a for a in run.answers if a.request.params.mode is Mode.DIFFUSION)
    return [gap for answer in answers for gap in answer.gaps_per_step()]
