"""The nouns everything else speaks in: requests, parameters, events.

Plain data without torch. The engine knows token ids only; text is the business of whoever holds the tokenizer.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NewType

from twotower.errors import TwoTowerError

RequestId = NewType("RequestId", str)


class Mode(StrEnum):
    """How a request is decoded."""

    DIFFUSION = "diffusion"
    MOCK_AR = "mock_ar"
    AR = "ar"


class FinishReason(StrEnum):
    """Why a request ended without an error."""

    STOP = "stop"
    LENGTH = "length"


GREEDY_BELOW = 1e-5  # a temperature that only fp32 overflow tells from 0


@dataclass(frozen=True, slots=True)
class DecodingParams:
    """How to decode one request. Names and meaning are the released script's; `docs/parameters.md` lists them.

    `top_k` 0 and `top_p` 1.0 mean "off". `seed` decides every random number of the request, together with
    block, step and position. Values are checked by `twotower.validation`, not here.
    """

    mode: Mode = Mode.DIFFUSION
    max_new_tokens: int = 128
    block_size: int = 16
    steps_per_block: int = 16
    confidence_threshold: float = 0.8
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    @property
    def samples(self) -> bool:
        """Whether random numbers decide its tokens; otherwise it decodes greedily."""
        return self.temperature >= GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for, as token ids. Immutable; the decoding state of it is a *sequence*.

    `priority` decides when it starts, never its tokens: a lower value goes first (`twotower.engine.ledger`).
    `committed`: the first of its new tokens, where it was begun elsewhere (in `diffusion` whole blocks). Its events go
    on after them, from `start` == len(`committed`).
    """

    id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: DecodingParams = field(default_factory=DecodingParams)
    priority: int = 0
    committed: tuple[int, ...] = ()

    @property
    def history(self) -> tuple[int, ...]:
        """What its sequence begins with: the prompt, and what has been committed of the answer."""
        return self.prompt_token_ids + self.committed

    @property
    def positions(self) -> int:
        """Cache positions this request may fill at most: the prompt and every block but the last, which is not read."""
        width = self.params.block_size if self.params.mode is Mode.DIFFUSION else 1
        blocks = -(-self.params.max_new_tokens // width)
        return len(self.prompt_token_ids) + (blocks - 1) * width

    @property
    def needs_denoiser(self) -> bool:
        """Whether a denoiser leads it; otherwise the context tower's engine does it alone."""
        return self.params.mode is not Mode.AR


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """How likely the context tower finds the tokens from position `start` on, each after all before it.

    1 <= `start` < len(`token_ids`): the first token follows nothing, so nothing says how likely it is. `priority` as
    a Request's.
    """

    id: RequestId
    token_ids: tuple[int, ...]
    start: int
    priority: int = 0

    @property
    def positions(self) -> int:
        """Cache positions it fills: those of all tokens but the last, which is not read."""
        return len(self.token_ids) - 1

    @property
    def needs_denoiser(self) -> bool:
        return False


AnyRequest = Request | ScoreRequest


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """Committed tokens of one request: a block in `diffusion`, a token (or several, merged) in `ar` and `mock_ar`.

    `start` is the index of the first of them among the request's new tokens. `num_steps` counts denoiser steps.
    The last event of a request carries a `finish_reason`; it may hold no tokens. It also tells the smallest margin of
    the request's decisions (`twotower.decoding.margins`): in fp32, only below 1e-5 might its tokens have been others.
    """

    request_id: RequestId
    start: int
    token_ids: tuple[int, ...]
    num_steps: int
    num_blocks: int
    finish_reason: FinishReason | None = None
    margin: float | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None

    def first(self, count: int) -> "BlockEvent":
        """Its first `count` tokens with what they cost. A block costs the whole of it, however few of them are taken;
        tokens of causal modes, each a block of its own, cost their share of what was merged.
        """
        if count >= len(self.token_ids):
            return self
        blocks = min(count, self.num_blocks)
        steps = self.num_steps * blocks // max(1, self.num_blocks)
        return replace(self, token_ids=self.token_ids[:count], num_steps=steps, num_blocks=blocks)

    def after(self, count: int) -> "BlockEvent":
        """It without its first `count` tokens and what they cost."""
        head = self.first(count)
        return replace(
            self,
            start=self.start + count,
            token_ids=self.token_ids[count:],
            num_steps=self.num_steps - head.num_steps,
            num_blocks=self.num_blocks - head.num_blocks,
        )

    def joined(self, following: "BlockEvent") -> "BlockEvent":
        """This one and the next of its request as one."""
        return BlockEvent(
            self.request_id,
            self.start,
            self.token_ids + following.token_ids,
            self.num_steps + following.num_steps,
            self.num_blocks + following.num_blocks,
            following.finish_reason,
            following.margin,
        )


@dataclass(frozen=True, slots=True)
class ScoreEvent:
    """The whole answer to a ScoreRequest, one entry for each token from its `start` on.

    `log_probs`: natural logarithms, the fp32 log-softmax of the context tower's fp32 logits. `is_greedy`: whether `ar`
    would have chosen this token at temperature 0; `margin` is the smallest of these decisions.
    """

    request_id: RequestId
    log_probs: tuple[float, ...]
    is_greedy: tuple[bool, ...]
    margin: float

    @property
    def is_last(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class FailureEvent:
    """The request ended with an error. Nothing follows."""

    request_id: RequestId
    error: TwoTowerError


@dataclass(frozen=True, slots=True)
class ReleasedEvent:
    """The engine has given back every slot and page of this request; the ledger may count them as free."""

    request_id: RequestId


AnswerEvent = BlockEvent | ScoreEvent
Event = AnswerEvent | FailureEvent | ReleasedEvent
