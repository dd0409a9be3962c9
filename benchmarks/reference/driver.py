"""Closed-loop clients: each of them asks, reads the answer to its end and asks again, until the requests are gone."""

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.reference.paths import Path, Running
from twotower.core import Request


@dataclass(slots=True)
class Answer:
    """One request's answer. Times in seconds since it was asked."""

    token_ids: list[int] = field(default_factory=list)
    num_steps: int = 0
    arrivals: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one path over some requests."""

    seconds: float
    answers: tuple[Answer, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def tokens_per_step(self) -> float | None:
        """None where no denoiser stepped."""
        steps = sum(answer.num_steps for answer in self.answers)
        return self.num_tokens / steps if steps else None

    @property
    def first_token_s(self) -> float:
        """Median time from asking to the first tokens, waiting for one's turn included."""
        return statistics.median(answer.arrivals[0] for answer in self.answers)

    @property
    def between_blocks_s(self) -> float | None:
        """Median time between two arrivals of one answer (in `ar`: between tokens)."""
        gaps = [b - a for answer in self.answers for a, b in zip(answer.arrivals, answer.arrivals[1:], strict=False)]
        return statistics.median(gaps) if gaps else None


async def drive(path: Path, warm_up: Sequence[Request], requests: Sequence[Request], concurrency: int) -> Measured:
    """Bring a path up, warm it, then time `requests` from `concurrency` clients."""
    async with path.open() as running:
        for request in warm_up:
            await _ask(running, request)
        answers: dict[int, Answer] = {}
        waiting = deque(enumerate(requests))

        async def client() -> None:
            while waiting:
                number, request = waiting.popleft()
                answers[number] = await _ask(running, request)

        started = time.perf_counter()
        async with asyncio.TaskGroup() as clients:
            for _ in range(concurrency):
                clients.create_task(client())
        seconds = time.perf_counter() - started
    return Measured(seconds, tuple(answers[number] for number in range(len(requests))))


async def _ask(running: Running, request: Request) -> Answer:
    answer = Answer()
    asked = time.perf_counter()
    async for piece in running.generate(request):
        if piece.token_ids:
            answer.arrivals.append(time.perf_counter() - asked)
        answer.token_ids.extend(piece.token_ids)
        answer.num_steps += piece.num_steps
    return answer
