"""Asks the service every prompt in every way, a bounded number at a time, and keeps the answers."""

import asyncio
import hashlib
import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.cli import tls
from cluster.cli.asking import Refused, credentials, explained
from cluster.cli.tune.questions import Question
from twotower.core import Mode
from twotower.errors import Unavailable
from twotower_client import AsyncClient, RetryPolicy, ServiceError
from twotower_client.asking import Options

_WARM_UP = 2
# A full service, or one whose cell is being replaced, is asked again.
RETRIES = RetryPolicy(attempts=7, first_s=1.0, longest_s=8.0)


class Way(NamedTuple):
    """How prompts are answered. `threshold`: γ of `diffusion`, None of other modes."""

    mode: Mode
    threshold: float | None = None

    def __str__(self) -> str:
        return str(self.mode) if self.threshold is None else f"γ {self.threshold:g}"


AR, VERIFIED = Way(Mode.AR), Way(Mode.VERIFIED)


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer: its text (empty where the service has no tokenizer), tokens and denoiser steps.

    `asked_again`: how often, before it came.
    """

    text: str
    token_ids: tuple[int, ...]
    num_steps: int
    asked_again: int = 0


@dataclass(frozen=True, slots=True)
class Pass:
    """All prompts once, in one way."""

    way: Way
    answers: tuple[Answered, ...]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return sum(len(answer.token_ids) for answer in self.answers) / self.seconds

    @property
    def asked_again(self) -> int:
        return sum(answer.asked_again for answer in self.answers)

    @property
    def tokens_per_step(self) -> float:
        """1 for `ar`. In `verified` the context tower's reads of drafts do not count."""
        tokens = sum(len(answer.token_ids) for answer in self.answers)
        return 1.0 if self.way == AR else tokens / max(1, sum(answer.num_steps for answer in self.answers))


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to ask: the service, the ways, the number at a time, the maximum of tokens (None: the service's default).

    `ways`: `ar` first.
    """

    address: str
    questions: Sequence[Question]
    ways: Sequence[Way]
    concurrency: int
    max_new_tokens: int | None
    timeout_s: float

    @property
    def num_calls(self) -> int:
        return len(self.questions) * len(self.ways)

    def about(self) -> dict[str, object]:
        """Everything that decides a pass, except the service. Not the ways, because a continued sweep may have more,
        and not the known answers, which are compared afterwards.
        """
        asked = json.dumps([question.prompt for question in self.questions])
        return {
            "prompts": hashlib.sha256(asked.encode()).hexdigest()[:16],
            "prompts at once": self.concurrency,
            "tokens of an answer": self.max_new_tokens,
        }

    async def run(
        self, known: Mapping[Way, Pass], answered: Callable[[], object], keep: Callable[[Pass], object]
    ) -> list[Pass]:
        """Run each way except the `known` ones; `answered` is called for each answer, `keep` for each pass.

        Raises Refused or Unavailable.
        """
        credentials()
        url, trust = tls.grpc_target(self.address)
        async with AsyncClient(url, tls=trust, retry=RETRIES, timeout_s=self.timeout_s) as client:
            passes = []
            for way in self.ways:
                one = known.get(way)
                if one is None:
                    for question in self.questions[:_WARM_UP]:
                        await self._ask(client, question, way)
                    one = await self._pass(client, way, answered)
                    keep(one)
                passes.append(one)
            return passes

    async def _pass(self, client: AsyncClient, way: Way, answered: Callable[[], object]) -> Pass:
        waiting = deque(enumerate(self.questions))
        answers: dict[int, Answered] = {}

        async def one_client() -> None:
            while waiting:
                number, question = waiting.popleft()
                answers[number] = await self._ask(client, question, way)
                answered()

        started = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as clients:
                for _ in range(self.concurrency):
                    clients.create_task(one_client())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        seconds = time.perf_counter() - started
        return Pass(way, tuple(answers[number] for number in range(len(self.questions))), seconds)

    async def _ask(self, client: AsyncClient, question: Question, way: Way) -> Answered:
        options: Options = {"temperature": 0.0, "request_id": f"tune-{uuid.uuid4()}", "mode": way.mode.value}
        options |= {"confidence_threshold": way.threshold, "max_new_tokens": self.max_new_tokens}
        try:
            answer = await client.complete(question.prompt, **options)
        except ServiceError as error:
            raise _told(error, self.address, question) from None
        return Answered(answer.text, answer.token_ids, answer.usage.num_steps, answer.attempts - 1)


def _told(error: ServiceError, address: str, question: Question) -> Unavailable | Refused:
    """Only a wrong request is reported with its line."""
    told = explained(error, address)
    return Refused(f"line {question.line}: {told}", True) if isinstance(told, Refused) and told.mistake else told
