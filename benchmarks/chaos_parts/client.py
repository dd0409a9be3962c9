"""The requests to a service under faults, the library's answers to them in this process, and clients that ask over both
faces and compare.
"""

import asyncio
import itertools
import json
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import httpx

from benchmarks.chaos_parts.access import Access
from benchmarks.reference.workload import DEMO, Workload
from cluster.runs.answer import Usage
from twotower.core import BlockEvent, DecodingParams, Mode, Request, RequestId, ScoreRequest
from twotower.engine.in_process import open_pair
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings
from twotower.model.checkpoint import Checkpoint
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc
from twotower.text.answer_text import AnswerText
from twotower.text.tokenizer import Tokenizer, load_tokenizer

_TRIES, _CLEAR = 4, 2e-5
NEAR_TIE = 1e-5  # twotower.core: below it, fp32 may decide otherwise
BY_OTHER = "right, by the other weights"
_SAME_LOG_PROB = 1e-3
_LIMIT_S = 300.0
_RETRY_S, _RETRY_PAUSE_S = 90.0, 0.2
_CHANNEL = [("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", 500)]
_TEMPERATURE = 0.7
Kind = tuple[str, Mode | None, bool, bool]  # face, mode, whether it is a stream, whether a stop string ends it
KINDS: Sequence[Kind] = (
    ("grpc", Mode.DIFFUSION, True, False),
    ("http", Mode.MOCK_AR, True, False),
    ("grpc", Mode.AR, True, True),
    ("http", Mode.DIFFUSION, True, True),
    ("grpc", None, False, False),  # scores
    ("grpc", Mode.MOCK_AR, True, False),
    ("http", Mode.AR, True, False),
    ("http", Mode.DIFFUSION, False, False),
)


Part = tuple[Sequence[int], str, Usage | None]  # tokens, text, and what the answer has cost, where that is told


@dataclass(frozen=True, slots=True)
class Right:
    """The library's answer. `margin` of the closest decision."""

    tokens: tuple[int, ...]
    text: str
    usage: Usage
    margin: float
    log_probs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """One that is asked again and again. Without a `mode` it is the likelihood of the tokens from `start` on."""

    face: str
    mode: Mode | None
    is_stream: bool
    prompt: tuple[int, ...]
    params: DecodingParams
    stop: tuple[str, ...] = ()
    start: int = 0
    right: Right = field(default=Right((), "", Usage(0), math.inf), compare=False)
    other: Right | None = field(default=None, compare=False)  # of other weights, where a service changes to them


@dataclass(slots=True)
class Asked:
    """One request: when it was sent, got each event and ended, on this machine's monotonic clock; what came of it.

    `errors`: what it ended with, once for every try.
    """

    label: str
    question: Question
    sent: float
    events: list[float] = field(default_factory=list)
    ended: float = math.inf
    outcome: str = ""
    errors: list[tuple[float, str]] = field(default_factory=list)

    def stall_s(self, fault: float) -> float:
        """The longest it went without an event from the fault on."""
        times = [self.sent, *self.events, self.ended]
        return max((after - before for before, after in itertools.pairwise(times) if after > fault), default=0.0)


async def questions(number: int, max_new_tokens: int, seed: int = 0, kinds: Sequence[Kind] = KINDS) -> list[Question]:
    """Mixed ones with the library's answers: each kind in turn, short prompts and long ones, greedy and sampled. All of
    their decisions are clear ones, so that every change is a fault."""
    workload = Workload(Checkpoint.open(DEMO), max_new_tokens, 1.0, ignore_eos=True, seed=seed)
    prompts = [request.prompt_token_ids for request in workload.requests(Mode.AR, _TRIES * number, "prompt")]
    tokenizer = load_tokenizer(DEMO)
    async with open_pair(DEMO, EngineSettings(capture="off"), device="cpu") as pair:

        async def clear(index: int) -> Question:
            for attempt in range(_TRIES):
                kind = kinds[index % len(kinds)]
                question = _question(kind, prompts[index + attempt * number :], index, max_new_tokens, seed + attempt)
                answered = await _answered(pair, question, kind[3], tokenizer)
                if answered.right.margin > _CLEAR:
                    break
            return answered

        return await asyncio.gather(*map(clear, range(number)))


def _question(kind: Kind, prompts: Sequence[tuple[int, ...]], index: int, max_new_tokens: int, seed: int) -> Question:
    face, mode, is_stream, _ = kind
    params = DecodingParams(mode or Mode.AR, max_new_tokens, seed=1000 * index + seed, ignore_eos=True)
    if mode is Mode.DIFFUSION:
        params = replace(params, confidence_threshold=1.0)
    if index % 3 == 2:
        params = replace(params, temperature=_TEMPERATURE)
    long = tuple(token for prompt in prompts for token in prompt)[: 600 + index]
    prompt = long if index % 5 == 4 else prompts[0]
    return Question(face, mode, is_stream, prompt, params, start=len(prompt) // 2)


async def also_answered(questions: Sequence[Question], checkpoint: Path) -> list[Question]:
    """The same with what other weights in the demo's layout, with its tokenizer, answer."""
    tokenizer = load_tokenizer(DEMO)
    async with open_pair(checkpoint, EngineSettings(capture="off"), device="cpu") as pair:

        async def other(question: Question) -> Question:
            if question.mode is None:
                return replace(question, other=await _scored(pair, question))
            return replace(question, other=_told(await _events(pair, question), question, question.stop, tokenizer))

        return await asyncio.gather(*map(other, questions))


async def _answered(pair: Pair, question: Question, stops: bool, tokenizer: Tokenizer | None) -> Question:
    if question.mode is None:
        return replace(question, right=await _scored(pair, question))
    events = await _events(pair, question)
    whole = _told(events, question, (), tokenizer)
    middle = len(whole.text) * 2 // 3
    if not stops or not whole.text[middle:]:
        return replace(question, right=whole)
    stop = (whole.text[middle : middle + 4],)
    return replace(question, stop=stop, right=_told(events, question, stop, tokenizer))


async def _scored(pair: Pair, question: Question) -> Right:
    request = ScoreRequest(RequestId(f"score-{question.params.seed}"), question.prompt, question.start)
    scored = await pair.score(request, _LIMIT_S)
    tokens = question.prompt[question.start :]
    return Right(tokens, "", Usage(question.start, len(tokens)), scored.margin, scored.log_probs)


async def _events(pair: Pair, question: Question) -> list[BlockEvent]:
    request = Request(RequestId(f"right-{question.params.seed}"), question.prompt, question.params)
    return [event async for event in pair.generate(request, _LIMIT_S)]


def _told(
    events: Sequence[BlockEvent], question: Question, stop: tuple[str, ...], tokenizer: Tokenizer | None
) -> Right:
    """What a client is told of these events."""
    answer, usage = AnswerText(tokenizer, stop), Usage(len(question.prompt))
    for event in events:
        taken, _ = answer.push(event.token_ids, last=event.is_last)
        usage = usage.plus(event.first(len(taken)))
        if answer.stopped:
            break
    return Right(tuple(answer.token_ids), answer.text or "", usage, events[-1].margin or math.inf)


class Client:
    """Asks over both faces."""

    def __init__(self, stub: pb_grpc.GenerationServiceStub, http: httpx.AsyncClient) -> None:
        self.stub, self.http = stub, http

    async def ask(self, asked: Asked, heard: Callable[[Asked], None], retry: bool = False) -> None:
        """Ends with an `outcome`: right, near tie, changed, or failed. `heard` is told of each event at once; `retry`:
        a request that fails is asked again under its name."""
        deadline = time.monotonic() + _RETRY_S
        while True:
            try:
                asked.outcome = outcome_of(asked.question, await self._answer(asked, heard))
                break
            except (grpc.aio.AioRpcError, httpx.HTTPError, Unanswered) as error:
                asked.outcome = f"failed: {_named(error)}"
                asked.errors.append((time.monotonic(), asked.outcome))
            if not retry or time.monotonic() > deadline:
                break
            await asyncio.sleep(_RETRY_PAUSE_S)
        asked.ended = time.monotonic()

    async def _answer(self, asked: Asked, heard: Callable[[Asked], None]) -> Right:
        question = asked.question
        if question.mode is None:
            return await self._scores(asked)
        tokens, text, usage = list[int](), "", Usage(0)
        async for some, more, told in self.parts(asked):
            if some and question.is_stream:
                asked.events.append(time.monotonic())
                heard(asked)
            tokens += some
            text += more
            usage = told or usage
        return Right(tuple(tokens), text, usage, math.inf)

    async def _scores(self, asked: Asked) -> Right:
        question = asked.question
        before, after = question.prompt[: question.start], question.prompt[question.start :]
        request = pb.ScoreRequest(
            request_id=asked.label,
            prompt_token_ids=pb.TokenIds(ids=before),
            continuation_token_ids=pb.TokenIds(ids=after),
        )
        answer = await self.stub.Score(request, timeout=_LIMIT_S)
        tokens = tuple(answer.token_ids)
        return Right(tokens, "", Usage(answer.prompt_tokens, len(tokens)), math.inf, tuple(answer.log_probs))

    def parts(self, asked: Asked, timeout_s: float = _LIMIT_S) -> AsyncGenerator[Part, None]:
        """Of an answer, as they come. Raises Unanswered, and what httpx and gRPC raise."""
        return self._grpc(asked, timeout_s) if asked.question.face == "grpc" else self._http(asked, timeout_s)

    async def _grpc(self, asked: Asked, timeout_s: float) -> AsyncGenerator[Part, None]:
        call = self.stub.GenerateStream(_message(asked), timeout=timeout_s)
        try:
            async for event in call:
                if event.HasField("block"):
                    yield event.block.token_ids, event.block.text, None
                else:
                    u = event.finished.usage
                    yield (), "", Usage(u.prompt_tokens, u.completion_tokens, u.num_steps, u.num_blocks)
        finally:
            call.cancel()

    async def _http(self, asked: Asked, timeout_s: float) -> AsyncGenerator[Part, None]:
        headers = {"x-request-timeout": str(timeout_s)}
        async with self.http.stream("POST", "/v1/completions", json=body_of(asked), headers=headers) as response:
            if response.status_code != 200:
                raise Unanswered(f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')}")
            if not asked.question.is_stream:
                yield _part(json.loads(await response.aread()))
                return
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield _part(json.loads(line.removeprefix("data: ")))
            raise Unanswered("the stream ended without [DONE]")


class Unanswered(Exception):
    """The service said no, or stopped in the middle."""


@asynccontextmanager
async def client_of(http: str, address: str, access: Access | None = None) -> AsyncGenerator[Client, None]:
    """`access`: of a service that wants keys and speaks TLS."""
    given: dict[str, Any] = {"timeout": _LIMIT_S, "limits": httpx.Limits(max_connections=128), "trust_env": False}
    if access is None:
        opened, url = grpc.aio.insecure_channel(address, options=_CHANNEL), f"http://{http}"
    else:
        opened = grpc.aio.secure_channel(address, access.channel, options=[*_CHANNEL, *access.options])
        given |= {"verify": access.tls.context(), "headers": access.headers, "event_hooks": access.hooks}
        url = f"https://{http}"
    async with opened as channel, httpx.AsyncClient(base_url=url, **given) as client:
        yield Client(pb_grpc.GenerationServiceStub(channel), client)


class Load:
    """Closed loops of clients, each with the next question, until `stop`."""

    def __init__(self, ask: Callable[[Asked], Awaitable[None]], questions: Sequence[Question], name: str) -> None:
        self._ask, self._questions, self._name = ask, questions, name
        self._numbers, self._tasks = itertools.count(), set[asyncio.Task[None]]()
        self._clients = 0
        self.asked: list[Asked] = []

    def start(self, clients: int) -> None:
        self._clients = clients
        self._tasks = {asyncio.create_task(self._loop(number)) for number in range(clients)}

    def ease(self, clients: int) -> None:
        """No more than so many go on asking."""
        self._clients = clients

    @property
    def in_flight(self) -> list[Asked]:
        return [asked for asked in self.asked if math.isinf(asked.ended)]

    async def stop(self, within_s: float) -> None:
        """What is under way ends by itself, or counts as failed."""
        self.ease(0)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within_s)
        for asked in self.in_flight:
            asked.outcome, asked.ended = f"failed: no end within {within_s:g} s", time.monotonic()
        for task in self._tasks:
            task.cancel()
        for finished in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(finished, Exception):
                raise finished

    async def once(self) -> None:
        number = next(self._numbers)
        question = self._questions[number % len(self._questions)]
        asked = Asked(f"{self._name}-{number}", question, time.monotonic())
        self.asked.append(asked)
        await self._ask(asked)

    def also(self, number: int) -> None:
        """So many requests more, at once."""
        self._tasks |= {asyncio.create_task(self.once()) for _ in range(number)}

    async def _loop(self, number: int) -> None:
        while number < self._clients:
            await self.once()


def outcome_of(question: Question, got: Right) -> str:
    """Right, near tie, or changed and how. Where the service changes to other weights, all of an answer is of one."""
    right, other = question.right, question.other
    if _is_same(got, right):
        return "right"
    if other is not None and _is_same(got, other):
        return BY_OTHER
    if min(wanted.margin for wanted in (right, other) if wanted is not None) < NEAR_TIE:
        return "near tie"
    for name in ("tokens", "text", "usage", "log_probs"):
        ours, theirs = getattr(got, name), getattr(right, name)
        if ours != theirs:
            return f"changed {name}: got {_shown(ours)}, wanted {_shown(theirs)}"
    return "changed"


def _is_same(got: Right, right: Right) -> bool:
    same_scores = len(got.log_probs) == len(right.log_probs) and all(
        abs(a - b) < _SAME_LOG_PROB for a, b in zip(got.log_probs, right.log_probs, strict=True)
    )
    return got.tokens == right.tokens and got.text == right.text and got.usage == right.usage and same_scores


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) < 400 else f"{text[:400]}…"


def _named(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"


def _part(event: Any) -> Part:
    """Of an HTTP answer or one of its events."""
    if "error" in event:
        raise Unanswered(f"an error event: {event['error']}")
    tokens = [token for choice in event["choices"] for token in choice["token_ids"]]
    text = "".join(choice["text"] for choice in event["choices"])
    told = event.get("usage")
    usage = told and Usage(
        *(told[f"{name}_tokens"] for name in ("prompt", "completion")), told["num_steps"], told["num_blocks"]
    )
    return tokens, text, usage


def _message(asked: Asked) -> pb.GenerateRequest:
    question = asked.question
    assert question.mode is not None
    given = {name: value for name, value in _given(question).items() if name != "mode"}
    params = pb.DecodingParams(mode=f"MODE_{question.mode.upper()}", **given)
    ids = pb.TokenIds(ids=question.prompt)
    return pb.GenerateRequest(request_id=asked.label, token_ids=ids, params=params, stop=question.stop)


def body_of(asked: Asked) -> dict[str, object]:
    given = _given(asked.question)
    diffusion = {name: given.pop(name) for name in ("mode", "confidence_threshold") if name in given}
    body: dict[str, object] = {"prompt": asked.question.prompt, "request_id": asked.label, "diffusion": diffusion}
    body |= {"max_tokens": given.pop("max_new_tokens"), **given}
    if asked.question.stop:
        body["stop"] = asked.question.stop
    if asked.question.is_stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def _given(question: Question) -> dict[str, object]:
    """Parameters by the names of DecodingParams."""
    names = ["mode", "max_new_tokens", "seed", "ignore_eos", "temperature"]
    if question.mode is Mode.DIFFUSION:
        names.append("confidence_threshold")
    return {name: getattr(question.params, name) for name in names}
