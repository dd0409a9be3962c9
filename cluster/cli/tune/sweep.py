"""Asks the service every prompt in every way, a bounded number at a time, and keeps what came."""

import asyncio
import hashlib
import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grpc
import grpc.aio

from cluster.cli import tls
from cluster.cli.client import Refused, credentials, explained
from cluster.cli.tune.questions import Question
from cluster.faces.grpc.wire_params import params_message
from twotower.core import Mode
from twotower.errors import Unavailable
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

_WARM_UP = 2
# A full service or one whose cell is being replaced answers so; it is asked again after 1, 2, 4, 8, 8, 8 s.
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 8.0, 8.0)


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
    """What to ask: of whom, in which ways, how much at a time, how many tokens at most (None: the service's default).

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
        """What decides a pass, but for the service. Neither the ways, of which a sweep that goes on may have
        more, nor the answers, which are compared afterwards."""
        asked = json.dumps([question.prompt for question in self.questions])
        return {
            "prompts": hashlib.sha256(asked.encode()).hexdigest()[:16],
            "prompts at once": self.concurrency,
            "tokens of an answer": self.max_new_tokens,
        }

    async def run(
        self, known: Mapping[Way, Pass], answered: Callable[[], object], keep: Callable[[Pass], object]
    ) -> list[Pass]:
        """Each way, but for those `known` already; `answered` is called once an answer, `keep` once a pass.

        Raises Refused or Unavailable.
        """
        async with tls.aio_channel(self.address) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            passes = []
            for way in self.ways:
                one = known.get(way)
                if one is None:
                    for question in self.questions[:_WARM_UP]:
                        await self._ask(stub, question, way)
                    one = await self._pass(stub, way, answered)
                    keep(one)
                passes.append(one)
            return passes

    async def _pass(self, stub: pb_grpc.GenerationServiceStub, way: Way, answered: Callable[[], object]) -> Pass:
        waiting = deque(enumerate(self.questions))
        answers: dict[int, Answered] = {}

        async def client() -> None:
            while waiting:
                number, question = waiting.popleft()
                answers[number] = await self._ask(stub, question, way)
                answered()

        started = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as clients:
                for _ in range(self.concurrency):
                    clients.create_task(client())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        seconds = time.perf_counter() - started
        return Pass(way, tuple(answers[number] for number in range(len(self.questions))), seconds)

    async def _ask(self, stub: pb_grpc.GenerationServiceStub, question: Question, way: Way) -> Answered:
        for tried, pause_s in enumerate((*_PAUSES_S, None)):
            try:
                answer = await stub.Generate(
                    self._request(question, way), timeout=self.timeout_s, metadata=credentials()
                )
            except grpc.aio.AioRpcError as error:
                if error.code() not in _PASSING or pause_s is None:
                    raise _told(error, self.address, question) from None
                await asyncio.sleep(pause_s)
                continue
            return Answered(answer.text, tuple(answer.token_ids), answer.finished.usage.num_steps, tried)
        raise AssertionError("the last try returns or raises")

    def _request(self, question: Question, way: Way) -> pb.GenerateRequest:
        params = params_message({"mode": way.mode, "temperature": 0.0})
        if way.threshold is not None:
            params.confidence_threshold = way.threshold
        if self.max_new_tokens is not None:
            params.max_new_tokens = self.max_new_tokens
        request = pb.GenerateRequest(request_id=f"tune-{uuid.uuid4()}", params=params)
        if isinstance(question.prompt, str):
            request.text = question.prompt
        else:
            request.token_ids.ids.extend(question.prompt)
        return request


def _told(error: grpc.aio.AioRpcError, address: str, question: Question) -> Unavailable | Refused:
    """Only a request's own mistake is blamed on its line."""
    told = explained(error, address)
    return Refused(f"line {question.line}: {told}", True) if isinstance(told, Refused) and told.mistake else told
