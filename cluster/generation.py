"""The service's one path from what a client asked to what it gets. HTTP and gRPC are thin faces of this.

Knows validation, text and usage; does not know the wire on one side, nor Ray on the other.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from cluster.admission import Admission
from cluster.deadline import Deadline
from cluster.lanes import Lanes
from cluster.served_model import ServedModel
from cluster.streams import merged
from twotower.core import BlockEvent, FinishReason, Request, ScoreEvent, ScoreRequest
from twotower.decoding.text import AnswerText
from twotower.decoding.tokenizer import check_stop, require_tokenizer
from twotower.errors import DeadlineExceeded, InvalidRequest, Unavailable
from twotower.validation import check_bytes, make_request, make_score_request, show

_TOKENIZED_S = 1e-6  # a byte, about
_LABEL = re.compile(r"[\x21-\x7e]{1,128}")


class Cells(Protocol):
    """Whatever decodes and scores: cells behind a Serve handle, or a fake."""

    def generate(self, request: Request, timeout_s: float) -> AsyncGenerator[BlockEvent, None]:
        """Events of one request. Raises TwoTowerErrors. Closing the generator frees the sequence."""
        ...

    async def score(self, request: ScoreRequest, timeout_s: float) -> ScoreEvent:
        """Raises TwoTowerErrors. Cancelling it frees the sequence."""
        ...

    async def ready(self) -> bool:
        """Whether a cell answers."""
        ...


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client sent, unchecked. `params` holds only what was given, under the names of DecodingParams.

    `label` is the client's name for it, echoed and logged; several requests may bear the same. `id` is ours.
    """

    prompt: str | Sequence[object]
    params: Mapping[str, object] = field(default_factory=dict)
    stop: object = ()
    label: str = ""
    priority: object = 0
    id: str = field(default_factory=lambda: drawn_id())


@dataclass(frozen=True, slots=True)
class ScoreAsk:
    """What a client wants scored, unchecked: the continuation, after the prompt. Each is text or token ids.

    `label` as an Ask's.
    """

    prompt: str | Sequence[object]
    continuation: str | Sequence[object]
    label: str = ""
    priority: object = 0


@dataclass(frozen=True, slots=True)
class Order:
    """A checked request, the strings that end its text, and what its client calls it."""

    request: Request
    stop: tuple[str, ...]
    label: str = ""

    @property
    def shown_id(self) -> str:
        """What an answer is called: the client's name for it, else our id."""
        return self.label or self.request.id


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request has cost so far."""

    prompt_tokens: int
    completion_tokens: int = 0
    num_steps: int = 0
    num_blocks: int = 0

    def plus(self, event: BlockEvent) -> "Usage":
        return Usage(
            self.prompt_tokens,
            self.completion_tokens + len(event.token_ids),
            self.num_steps + event.num_steps,
            self.num_blocks + event.num_blocks,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Committed tokens, the text that became certain with them, the usage so far. The last has a `finish_reason`."""

    start: int
    token_ids: tuple[int, ...]
    text: str
    num_steps: int
    num_blocks: int
    usage: Usage
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Answer:
    """A whole answer, once `finish_reason` is there; before that, what of it has come."""

    usage: Usage
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @classmethod
    def to(cls, order: "Order") -> "Answer":
        return cls(Usage(len(order.request.prompt_token_ids)))

    def add(self, chunk: Chunk) -> None:
        self.token_ids.extend(chunk.token_ids)
        self.texts.append(chunk.text)
        self.usage, self.finish_reason = chunk.usage, chunk.finish_reason


class Generation:
    """Checks requests and has cells decode or score them. `at_once`: orders of one call that they hold at a time.

    Faces take a place of the `admission` for as long as they are busy with a call.
    """

    def __init__(
        self,
        model: ServedModel,
        cells: Cells,
        default_timeout_s: float = 600.0,
        at_once: int = 16,
        admission: Admission | None = None,
    ) -> None:
        self.model, self.cells, self.default_timeout_s, self._at_once = model, cells, default_timeout_s, at_once
        self.lanes = Lanes()
        self.admission = admission or Admission(capacity=1024, slots=at_once)

    def places_of(self, orders: int) -> int:
        """How many places a call of so many orders takes: those that the cells hold of it at a time."""
        return min(orders, self._at_once)

    def deadline(self, timeout_s: float | None = None) -> Deadline:
        """For a request that comes in now; `timeout_s`: how long its client waits, where the client says."""
        return Deadline.after(self.default_timeout_s if timeout_s is None else timeout_s)

    async def order(self, ask: Ask, deadline: Deadline) -> Order:
        """Raises InvalidRequest for everything wrong with `ask`, before any cell is asked; DeadlineExceeded."""
        _check_label(ask.label)
        stop = check_stop(self.model.tokenizer, ask.stop)
        prompt = await self._token_ids("prompt", ask.prompt, deadline)
        request = make_request(ask.id, prompt, ask.params, self.model.limits, ask.priority)
        return Order(request, stop, ask.label)

    async def score_request(self, ask: ScoreAsk, deadline: Deadline) -> ScoreRequest:
        """Raises InvalidRequest for everything wrong with `ask`, before any cell is asked; DeadlineExceeded."""
        _check_label(ask.label)
        prompt = await self._token_ids("prompt", ask.prompt, deadline)
        continuation = await self._token_ids("continuation", ask.continuation, deadline)
        return make_score_request(drawn_id(), prompt, continuation, self.model.limits, ask.priority)

    async def score(self, request: ScoreRequest, deadline: Deadline) -> ScoreEvent:
        """Raises what the cell raises; cancelling it frees the sequence."""
        try:
            return await self.cells.score(request, deadline.left_s())
        except DeadlineExceeded:
            raise deadline.passed() from None

    async def stream(self, order: Order, deadline: Deadline) -> AsyncGenerator[Chunk, None]:
        """Chunks as blocks are committed. Raises what the cell raises; closing it frees the sequence."""
        try:
            events = self.cells.generate(order.request, deadline.left_s())
            async with aclosing(events), aclosing(self._chunks(order, events)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except DeadlineExceeded:
            raise deadline.passed() from None

    def many(self, orders: Sequence[Order], deadline: Deadline) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Chunks of all orders of a call as they come, each with its order's place. One deadline for all of them.

        The rest waits here, so that a call of many prompts needs no more room in the cells' queues than others do.
        """
        return merged([self.stream(order, deadline) for order in orders], at_once=self._at_once)

    async def whole(self, order: Order, deadline: Deadline) -> Answer:
        """The answer at once. Raises what the cell raises."""
        answer = Answer.to(order)
        async with aclosing(self.stream(order, deadline)) as chunks:
            async for chunk in chunks:
                answer.add(chunk)
        return answer

    async def _chunks(self, order: Order, events: AsyncIterator[BlockEvent]) -> AsyncGenerator[Chunk, None]:
        answer = AnswerText(self.model.tokenizer, order.stop)
        usage = Usage(len(order.request.prompt_token_ids))
        async for event in events:
            token_ids, text = answer.push(event.token_ids, last=event.finish_reason is not None)
            taken = event.first(len(token_ids))
            usage = usage.plus(taken)
            reason = FinishReason.STOP if answer.stopped else event.finish_reason
            yield Chunk(event.start, token_ids, text, taken.num_steps, taken.num_blocks, usage, reason)
            if reason is not None:
                return
        raise Unavailable("the cell's answer ended before it was finished")

    async def _token_ids(self, name: str, given: str | Sequence[object], deadline: Deadline) -> Sequence[object]:
        """Token ids of the prompt, or of the continuation of one. Text that cannot fit is not tokenized."""
        if not isinstance(given, str):
            await asyncio.sleep(0)  # many prompts of a call, one after the other, hold the loop up
            return given
        tokenizer = require_tokenizer(self.model.tokenizer, name)
        text = check_bytes(name, given, self.model.limits.max_sequence_length, tokenizer.bytes_per_token)
        if not text:
            return ()
        encode = tokenizer.encode if name == "prompt" else tokenizer.encode_continuation
        return await self.lanes.run(len(text.encode()) * _TOKENIZED_S, partial(encode, text), deadline)


def drawn_id() -> str:
    """An id that no other request has, of this router or of another."""
    return f"req-{uuid.uuid4().hex}"


def _check_label(label: str) -> None:
    if label and not _LABEL.fullmatch(label):
        raise InvalidRequest.of(
            "request_id", f"got {show(label)}, wanted 1 to 128 printable ASCII characters without spaces"
        )
