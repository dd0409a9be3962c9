"""A tokenizer of bytes and cells that play a script, so that both faces are tested without Ray and without towers."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence, Set
from contextlib import asynccontextmanager, contextmanager
from functools import cache

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.faces.grpc.service import GrpcServer
from cluster.runs.generation import Generation
from cluster.runs.observers import Observer
from cluster.runs.served_model import ServedModel
from twotower.core import (
    AnswerEvent,
    AnyRequest,
    BlockEvent,
    DecodingParams,
    FinishReason,
    Likelihood,
    Mode,
    Request,
    RoundEvent,
    ScoreEvent,
    ScoreRequest,
    StepEvent,
    TraceEvent,
)
from twotower.errors import Unavailable
from twotower.text.chat_template import ChatTemplate
from twotower.validation import ModelLimits

BLOCK = 4
SPECIAL = (b"<pad>", b"<s>", b"</s>", b"<mask>")
FINGERPRINT = "0123456789abcdef"
VOCABULARY = "fedcba9876543210"
TEMPLATE = "{% for message in messages %}{{ message.role[0] }}: {{ message.content }}\n{% endfor %}a:"


class ByteTokenizer:
    """A token is a byte, 4 above its value; 0 to 3 are the special ids of the released layout."""

    bytes_per_token = 1

    def encode(self, text: str) -> list[int]:
        return [1, *(byte + 4 for byte in text.encode("utf-8"))]

    def encode_continuation(self, text: str) -> list[int]:
        return self.encode(text)[1:]

    def decode(self, token_ids: Sequence[int], with_special: bool = False) -> str:
        said = (
            SPECIAL[token] if token < 4 else bytes([token - 4]) for token in token_ids if with_special or token >= 4
        )
        return b"".join(said).decode("utf-8", errors="replace")

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        return [SPECIAL[token].decode() if token < 4 else f"<0x{token - 4:02X}>" for token in token_ids]

    @property
    def described(self) -> Mapping[str, object]:
        return {"tokenizer_class": "ByteTokenizer", "bos_token": "<s>", "eos_token": "</s>"}

    @property
    def chat_template(self) -> str | None:
        return TEMPLATE

    def rendered(self, template: str, messages: Sequence[Mapping[str, str]]) -> str:
        return _compiled(template).render(messages=messages, add_generation_prompt=True)


@cache
def _compiled(template: str) -> Template:
    """Hundreds of tests have a model of their own, and each renders the template once to see that it can."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)


def tokens(text: str) -> tuple[int, ...]:
    """The text's tokens without the leading BOS."""
    return tuple(ByteTokenizer().encode(text)[1:])


class ScriptedAttempt:
    """A stay on a scripted cell: whatever its generator yields or raises."""

    def __init__(self, events: AsyncGenerator[AnswerEvent, None], cell: str, fingerprint: str) -> None:
        self._events, self.cell, self.fingerprint = events, cell, fingerprint
        self.vocabulary = VOCABULARY

    async def next(self) -> AnswerEvent:
        return await anext(self._events)

    async def close(self) -> None:
        await self._events.aclose()


class ScriptedCells:
    """Cells that answer every request with the same text, in blocks of 4 tokens, until its max_new_tokens.

    A trace has two steps a block, each fixing every other token with a confidence of a half. In `verified` the context
    tower rejects the last token, and writes it itself.

    Their score of a token is minus a hundredth of its id, and so is its log-probability. The token is greedy where the
    id is even. The likeliest tokens are those of the bytes 0, 1, 2 and so on.

    `fail` is called before each block with the request and the block's number and may raise. `pace_s` delays every
    block. `open` counts the streams not yet closed. Of each prompt `cached` tokens need not be read.
    """

    def __init__(self, text: str = "All good things come to those who wait.") -> None:
        self.answer = tokens(text)
        self.fail: Callable[[AnyRequest, int], None] = lambda request, block: None
        self.pace_s = 0.0
        self.is_ready = True
        self.serves = set(Mode)
        self.echo = False  # answer with the prompt's last token, again and again
        self.open = self.cached = 0
        self.requests: list[Request] = []
        self.scored: list[ScoreRequest] = []
        self.timeouts: list[float] = []

    async def served(self) -> Set[Mode]:
        return frozenset(self.serves) if self.is_ready else frozenset()

    def is_to_leave(self, cell: str, request: AnyRequest, fingerprint: str) -> bool:
        return False

    def elsewhere(self, request: AnyRequest, avoid: Set[str]) -> bool:
        return self._mode(request) in self.serves and "scripted" not in avoid

    def lacks(self, request: AnyRequest) -> bool:
        return bool(self.serves) and self._mode(request) not in self.serves

    def _mode(self, request: AnyRequest) -> Mode:
        return request.params.mode if isinstance(request, Request) else Mode.AR

    async def place(self, request: AnyRequest, timeout_s: float, avoid: Set[str]) -> ScriptedAttempt:
        if self._mode(request) not in self.serves:
            raise Unavailable("this cell cannot serve: a denoiser is lost")
        events = (
            self._score(request, timeout_s) if isinstance(request, ScoreRequest) else self.generate(request, timeout_s)
        )
        return ScriptedAttempt(events, "scripted", FINGERPRINT)

    async def _score(self, request: ScoreRequest, timeout_s: float) -> AsyncGenerator[AnswerEvent, None]:
        yield await self.score(request, timeout_s)

    async def generate(self, request: Request, timeout_s: float) -> AsyncGenerator[AnswerEvent, None]:
        self.requests.append(request)
        with self._opened(timeout_s):
            async for event in self._events(request):
                yield event

    async def score(self, request: ScoreRequest, timeout_s: float) -> ScoreEvent:
        self.scored.append(request)
        with self._opened(timeout_s):
            self.fail(request, 0)
            await asyncio.sleep(self.pace_s)
            scored = request.token_ids[request.start :]
            log_probs, is_greedy = (-token / 100 for token in scored), (token % 2 == 0 for token in scored)
            likelihoods = tuple(_likely(token, n) for token in scored) if (n := request.logprobs) is not None else ()
            return ScoreEvent(request.id, tuple(log_probs), tuple(is_greedy), 1.0, likelihoods, self.cached)

    @contextmanager
    def _opened(self, timeout_s: float) -> Iterator[None]:
        self.timeouts.append(timeout_s)
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    async def _events(self, request: Request) -> AsyncGenerator[AnswerEvent, None]:
        whole = request.prompt_token_ids[-1:] * len(self.answer) if self.echo else self.answer
        answer = whole[: request.params.max_new_tokens]
        reason = FinishReason.STOP if len(answer) == len(self.answer) else FinishReason.LENGTH
        for start in range(len(request.committed), len(answer), BLOCK):
            part = answer[start : start + BLOCK]
            for traced in self._trace(request, start, part) if request.trace else ():
                yield traced
            self.fail(request, start // BLOCK)
            await asyncio.sleep(self.pace_s)
            last = start + BLOCK >= len(answer)
            sure, most = 0.5 if request.params.mode is Mode.DIFFUSION else None, request.logprobs
            likelihoods = () if most is None else tuple(_likely(token, most, sure) for token in part)
            told = {"likelihoods": likelihoods, "cached_tokens": 0 if start else self.cached}
            yield BlockEvent(request.id, start, part, 2, 1, reason if last else None, **told)  # type: ignore[arg-type]

    def _trace(self, request: Request, start: int, part: Sequence[int]) -> Iterator[TraceEvent]:
        for step in (0, 1):
            places = range(step, len(part), 2)
            positions, token_ids = tuple(start + place for place in places), tuple(part[place] for place in places)
            yield StepEvent(request.id, start, BLOCK, step, positions, token_ids, (0.5,) * len(places))
        if request.params.mode is Mode.VERIFIED:
            yield RoundEvent(request.id, start, (*part[:-1], 35), len(part) - 1, part[-1])


def _likely(token: int, most: int, confidence: float | None = None) -> Likelihood:
    tops = range(4, 4 + most)
    return Likelihood(-token / 100, tuple(tops), tuple(-top / 100 for top in tops), confidence)


def all_modes() -> Set[Mode]:
    """What a service says that lacks nothing."""
    return frozenset(Mode)


def served_model(
    tokenizer: ByteTokenizer | None = None,
    modes: tuple[Mode, ...] = tuple(Mode),
    defaults: DecodingParams | None = None,
    template: str | None = TEMPLATE,
) -> ServedModel:
    limits = ModelLimits(260, 256, modes, defaults or DecodingParams())
    chat = None if tokenizer is None or template is None else ChatTemplate(tokenizer, template, "fake")
    return ServedModel("fake", limits, tokenizer, "two-tower", FINGERPRINT, VOCABULARY, chat)


def generation(
    cells: ScriptedCells,
    with_tokenizer: bool = True,
    observers: Sequence[Observer] = (),
    template: str | None = TEMPLATE,
) -> Generation:
    model = served_model(ByteTokenizer() if with_tokenizer else None, template=template)
    return Generation(model, cells, default_timeout_s=60.0, observers=observers)


@asynccontextmanager
async def grpc_server(service: Generation, max_bytes: int = 4 * 2**20) -> AsyncGenerator[tuple[str, GrpcServer], None]:
    """The real gRPC server on a free loopback port: its address and itself."""
    server = GrpcServer(service, "127.0.0.1", 0, max_bytes)
    await server.start()
    try:
        yield f"127.0.0.1:{server.port}", server
    finally:
        await server.stop(0)
