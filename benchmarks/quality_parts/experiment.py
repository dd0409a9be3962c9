"""Asks a target everything in a plan: quality family by family, speed in rounds that go over all ways."""

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer as BpeTokenizer
from tqdm import tqdm

from benchmarks.quality_parts.plan import BLOCK, QUALITY_CONCURRENCY, Plan
from benchmarks.quality_parts.record import Record, Run, Spent
from benchmarks.reference.paths import Path, Piece, Running
from twotower.core import Mode, Request, RequestId
from twotower.demo.corpus import Instance
from twotower.demo.evaluate import answer_of
from twotower.demo.scores import Score, Way
from twotower.demo.tokenizer import encode_prompt

_WARM_UP = 4


@dataclass(slots=True)
class Asked:
    """One answer as it came. Seconds from asking: to its first tokens, and to its end."""

    pieces: list[Piece] = field(default_factory=list)
    first_token_s: float = 0.0
    seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.token_ids) for piece in self.pieces)

    @property
    def num_steps(self) -> int:
        return sum(piece.num_steps for piece in self.pieces)

    @property
    def num_blocks(self) -> int:
        return sum(piece.num_blocks for piece in self.pieces)


class Experiment:
    """Runs a plan against a target, leaving out what the record has already."""

    def __init__(self, plan: Plan, target: Path, tokenizer: BpeTokenizer, record: Record) -> None:
        self.plan, self.record = plan, record
        self._target, self._tokenizer = target, tokenizer
        self._name = f"{time.time_ns():x}"  # a service takes each request id once

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens of each prompt that is timed."""
        timed = [instance for long in self.plan.lengths for instance in self.plan.sample(long)]
        return [len(encode_prompt(self._tokenizer, instance.prompt)) for instance in timed]

    async def run(self) -> None:
        with tqdm(total=self.plan.num_runs, unit="run", smoothing=0.05) as self._bar:
            async with self._target.open() as running:
                for family in self.plan.families:
                    await self._quality(running, family)
                for number in range(self.plan.rounds):
                    await self._speed(running, number)

    async def _quality(self, running: Running, family: str) -> None:
        instances = self.plan.instances(family)
        for way in self.plan.ways:
            if (family, str(way)) not in self.record.scores:
                self._bar.set_postfix_str(f"quality: {family}, {way}")
                asked, _ = await self._ask_all(running, instances, way, QUALITY_CONCURRENCY, f"q-{family}")
                answers = [
                    answer_of(self._tokenizer, instance, way.mode, one.pieces)
                    for instance, one in zip(instances, asked, strict=True)
                ]
                self.record.add_score(Score(family, str(way), tuple(answers)))
            self._bar.update()

    async def _speed(self, running: Running, number: int) -> None:
        for long in self.plan.lengths:
            for concurrency in self.plan.concurrency:
                ways = self.plan.speed_ways(concurrency)
                # Whoever went first in one round goes last in the next.
                for way in ways if number % 2 == 0 else ways[::-1]:
                    if (str(way), concurrency, number, long) not in self.record.runs:
                        kind = "long" if long else "short"
                        self._bar.set_postfix_str(f"speed, {kind} answers: {way} x{concurrency}, round {number + 1}")
                        self.record.add_run(await self._time(running, way, concurrency, number, long))
                    self._bar.update()

    async def _time(self, running: Running, way: Way, concurrency: int, number: int, long: bool) -> Run:
        name = f"{'l' if long else 's'}-{number}"
        await self._ask_all(running, self.plan.sample(long)[:_WARM_UP], way, concurrency, f"w{name}")
        many = self.plan.timed(concurrency, long)
        asked, seconds = await self._ask_all(running, many, way, concurrency, name)
        first = statistics.median(one.first_token_s for one in asked)
        tokens, steps = sum(one.num_tokens for one in asked), sum(one.num_steps for one in asked)
        tasks = _by_task(way, many, asked) if concurrency == 1 else {}
        return Run(str(way), concurrency, number, seconds, tokens, steps, first, long, tasks)

    async def _ask_all(
        self, running: Running, instances: Sequence[Instance], way: Way, concurrency: int, name: str
    ) -> tuple[list[Asked], float]:
        """Answers in the instances' order, and how long all of them took: `concurrency` closed-loop clients."""
        params = way.params()
        prefix = f"{self._name}-{name}-{way}-{concurrency}".replace(" ", "-")
        waiting = deque(enumerate(instances))
        answers: dict[int, Asked] = {}

        async def client() -> None:
            while waiting:
                number, instance = waiting.popleft()
                prompt = tuple(encode_prompt(self._tokenizer, instance.prompt))
                answers[number] = await _ask(running, Request(RequestId(f"{prefix}-{number}"), prompt, params))

        started = time.perf_counter()
        async with asyncio.TaskGroup() as clients:
            for _ in range(concurrency):
                clients.create_task(client())
        return [answers[number] for number in range(len(instances))], time.perf_counter() - started


async def _ask(running: Running, request: Request) -> Asked:
    asked = Asked()
    started = time.perf_counter()
    async for piece in running.generate(request):
        if piece.token_ids and not asked.num_tokens:
            asked.first_token_s = time.perf_counter() - started
        asked.pieces.append(piece)
    asked.seconds = time.perf_counter() - started
    return asked


def _by_task(way: Way, many: Sequence[Instance], asked: Sequence[Asked]) -> dict[str, Spent]:
    tasks: dict[str, Spent] = {}
    for instance, one in zip(many, asked, strict=True):
        commits = max(0, -(-one.num_tokens // BLOCK) - 1) if one.num_steps else 0
        if way.mode is Mode.VERIFIED:
            commits = one.num_blocks
        spent = Spent(1, one.num_tokens, one.num_steps, commits, one.seconds)
        tasks[instance.family] = tasks.get(instance.family, Spent()) + spent
    return tasks
