"""The nouns everything else speaks in: requests, parameters, events.

Plain data without torch. The engine knows token ids only; text is the business of whoever holds the tokenizer.
"""

from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import NamedTuple, NewType

from twotower.constraints import Constraint, Constraints
from twotower.errors import TwoTowerError
from twotower.parameters import Choice, Flag, Integer, Number, Parameter, Texts, TokenBiases, TokenIds, declared_in
from twotower.restored import across_versions

RequestId = NewType("RequestId", str)


class Mode(StrEnum):
    """How a request is decoded."""

    DIFFUSION = "diffusion"
    MOCK_AR = "mock_ar"
    AR = "ar"
    VERIFIED = "verified"
    AUTO = "auto"

    @property
    def by_token(self) -> bool:
        """Whether each token is an event of its own; whoever carries events may join some of them."""
        return self in (Mode.AR, Mode.MOCK_AR)


class Floor(StrEnum):
    """What `auto` may choose among: `lossless` the modes that give `ar`'s tokens, `confidence` also `diffusion`."""

    LOSSLESS = "lossless"
    CONFIDENCE = "confidence"


class FinishReason(StrEnum):
    """Why a request ended without an error."""

    STOP = "stop"
    LENGTH = "length"


GREEDY_BELOW = 1e-5  # a temperature that only fp32 overflow tells from 0
MAX_COUNT = 2**31 - 1  # of tokens, of candidates: more than any model has
MAX_BLOCK = 1024
# The mask token is held out of the choice by a logit of -1e12, which a larger temperature would let back in.
MAX_TEMPERATURE = 1000
MAX_SEED = 2**63 - 1
MAX_STOP_TOKEN_IDS = 64
MAX_BIASED_TOKENS, MAX_BIAS = 512, 100.0  # as many as a JSON object may have names
MAX_CONSTRAINT_BYTES = 32 * 1024
MAX_PENALTY, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 2.0, 0.01, 10.0
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 256
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1
MAX_ALTERNATIVES = 20
MAX_LIKELIHOODS = 2**18  # of tokens and alternatives that one call is told: 2 kB for each token with all alternatives

_AUTO = (Mode.AUTO,)
_DIFFUSION, _VERIFIED = (Mode.DIFFUSION, *_AUTO), (Mode.VERIFIED, *_AUTO)
_BLOCKS, _CAUSAL = (Mode.DIFFUSION, *_VERIFIED), (Mode.AR, Mode.MOCK_AR, *_VERIFIED)
# Of `diffusion`, and of `causal` modes; in `auto` they ask for this floor.
ONLY_WITH_FLOOR = {
    "steps_per_block": Floor.CONFIDENCE,
    "confidence_threshold": Floor.CONFIDENCE,
    "min_tokens": Floor.LOSSLESS,
    "logit_bias": Floor.LOSSLESS,
    "presence_penalty": Floor.LOSSLESS,
    "frequency_penalty": Floor.LOSSLESS,
    "repetition_penalty": Floor.LOSSLESS,
}


@across_versions
@dataclass(frozen=True, slots=True)
class DecodingParams:
    """How to decode one request; names and meaning are the released script's. The one declaration of each parameter.

    `seed` decides every random number of the request, together with block, step and position. Values are checked by
    `twotower.validation`, not here. A new one comes last.
    """

    mode: Mode = Parameter(
        Mode.DIFFUSION,
        Choice(Mode),
        "how to decode; a checkpoint without a denoiser serves `ar` only",
        http="diffusion.mode",
        by_service=True,
        default_is="the first of these that the checkpoint serves",
    ).field
    max_new_tokens: int = Parameter(
        128, Integer(1, MAX_COUNT), "tokens to generate at most", http="max_tokens", by_service=True
    ).field
    block_size: int = Parameter(
        16,
        Integer(1, MAX_BLOCK),
        "positions decoded together; 16 is what the model was trained with",
        _BLOCKS,
        http="diffusion.block_size",
        by_service=True,
    ).field
    steps_per_block: int = Parameter(
        16,
        Integer(1, MAX_BLOCK),
        "denoiser steps a block may take at most; fewer forces several positions per step",
        _DIFFUSION,
        http="diffusion.steps_per_block",
        by_service=True,
    ).field
    confidence_threshold: float = Parameter(
        0.8,
        Number(0, 1),
        "γ: positions whose probability is strictly above it are fixed at once; 0: the whole block in one step, "
        "1: one position per step",
        _DIFFUSION,
        http="diffusion.confidence_threshold",
        by_service=True,
    ).field
    temperature: float = Parameter(
        0.0,
        Number(0, MAX_TEMPERATURE),
        "0 is greedy: `seed`, `top_k` and `top_p` are taken, but have no effect then",
        by_service=True,
    ).field
    top_k: int = Parameter(0, Integer(0, MAX_COUNT), "sample among so many likeliest tokens", off=0).field
    top_p: float = Parameter(
        1.0, Number(0, 1, low_open=True), "sample among the likeliest tokens of this total", off=1.0
    ).field
    seed: int = Parameter(
        0,
        Integer(0, MAX_SEED),
        "decides every random number, whoever shares the batch",
        drawn=True,
        default_is="drawn and returned",
    ).field
    stop_token_ids: tuple[int, ...] = Parameter(
        (), TokenIds(MAX_STOP_TOKEN_IDS), "end the sequence like EOS; the stopping token is kept"
    ).field
    ignore_eos: bool = Parameter(False, Flag(), "go on past the checkpoint's EOS").field
    draft_steps: int = Parameter(
        2,
        Integer(1, MAX_BLOCK),
        "denoiser steps that a draft may take at most; the last one fills the block",
        _VERIFIED,
        http="diffusion.draft_steps",
        by_service=True,
    ).field
    draft_threshold: float = Parameter(
        0.6,
        Number(0, 1),
        "positions whose probability is strictly above it are drafted at once; never changes a token",
        _VERIFIED,
        http="diffusion.draft_threshold",
        by_service=True,
    ).field
    floor: Floor = Parameter(
        Floor.LOSSLESS,
        Choice(Floor),
        "the least quality: `ar`'s own tokens, or `diffusion` at γ = `confidence_threshold` too",
        _AUTO,
        http="diffusion.floor",
        by_service=True,
    ).field

    min_p: float = Parameter(
        0.0,
        Number(0, 1),
        "sample among tokens of at least this share of the likeliest one's probability",
        off=0.0,
    ).field
    min_tokens: int = Parameter(
        0,
        Integer(0, MAX_COUNT),
        "no EOS, no stop token and no stop string ends the answer before so many tokens; at most `max_new_tokens`",
        _CAUSAL,
        off=0,
    ).field
    logit_bias: tuple[tuple[int, float], ...] = Parameter(
        (), TokenBiases(MAX_BIASED_TOKENS, MAX_BIAS), "is added to the logits of these tokens", _CAUSAL, off=()
    ).field
    presence_penalty: float = Parameter(
        0.0,
        Number(-MAX_PENALTY, MAX_PENALTY),
        "is taken off the logit of each token that the answer has already",
        _CAUSAL,
        off=0.0,
    ).field
    frequency_penalty: float = Parameter(
        0.0,
        Number(-MAX_PENALTY, MAX_PENALTY),
        "is taken off a token's logit as often as the answer has the token already",
        _CAUSAL,
        off=0.0,
    ).field
    repetition_penalty: float = Parameter(
        1.0,
        Number(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
        "divides the logit of each token that prompt or answer have already; multiplies it where it is below 0",
        _CAUSAL,
        off=1.0,
    ).field

    structured_outputs: Constraint | None = Parameter(
        None,
        Constraints(MAX_CONSTRAINT_BYTES),
        "the text is what is described: EOS may come only where it is whole; needs a tokenizer",
        default_is="any text",
    ).field

    @property
    def penalises(self) -> bool:
        """Whether a token's logit depends on the tokens that are there already."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def steers(self) -> bool:
        """Whether the request changes logits before a token is chosen (`twotower.decoding.steering`)."""
        return bool(self.min_tokens or self.logit_bias or self.structured_outputs) or self.penalises

    @property
    def samples(self) -> bool:
        """Whether random numbers decide its tokens; otherwise it decodes greedily."""
        return self.temperature >= GREEDY_BELOW


PARAMETERS = declared_in(fields(DecodingParams))
# Of a request beside its DecodingParams.
STOP = Parameter(
    (),
    Texts(MAX_STOP_STRINGS, MAX_STOP_CHARACTERS),
    "the text ends before the first of them, `token_ids` with the token that completes it; needs a tokenizer",
    http="stop",
)
PRIORITY = Parameter(
    0,
    Integer(MIN_PRIORITY, MAX_PRIORITY),
    "when it starts where requests wait: lower goes first; never changes its tokens",
    http="priority",
)
TRACE = Parameter(
    False,
    Flag(),
    "tell, in a stream, which positions each step fixes; never changes a token",
    _BLOCKS,
    off=False,
    http="diffusion.trace",
)
LOGPROBS = Parameter(
    None,
    Integer(0, MAX_ALTERNATIVES),
    "tell of each token its log-probability under the context tower, and so many of the likeliest tokens at its place; "
    "never changes a token",
    http="logprobs",
    default_is="not told",
)


@across_versions
@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for, as token ids. Immutable; the decoding state of it is a *sequence*.

    `priority` decides when it starts, never its tokens: a lower value goes first (`twotower.engine.ledger`).
    `committed`: the first of its new tokens, where it was begun elsewhere (in `diffusion` whole blocks). Its events go
    on after them, from `start` == len(`committed`); in `auto` the context tower wrote them. `trace`: whether its
    TraceEvents are told. `logprobs`: whether its tokens are told with their Likelihood, and with how many alternatives.
    `cache_salt`: only requests with the same one share what the context tower keeps of prompts that begin alike; with
    None nothing of its prompt is kept, and all of the prompt is read.
    """

    id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: DecodingParams = field(default_factory=DecodingParams)
    priority: int = 0
    committed: tuple[int, ...] = ()
    trace: bool = False
    logprobs: int | None = None
    cache_salt: str | None = ""

    @property
    def history(self) -> tuple[int, ...]:
        """What its sequence begins with: the prompt, and what has been committed of the answer."""
        return self.prompt_token_ids + self.committed

    @property
    def positions(self) -> int:
        """Cache positions this request may fill at most: the prompt and every block but the last, which is not read.

        In `verified` no more of a draft is read than the answer may still take, so its blocks are tokens here; `auto`
        has room for it. What a denoiser has decided is read to its last token where likelihoods are told: they follow
        from reading.
        """
        if self.logprobs is not None and self.params.mode in (Mode.DIFFUSION, Mode.MOCK_AR, Mode.AUTO):
            return len(self.prompt_token_ids) + self.params.max_new_tokens
        width = self.params.block_size if self.params.mode is Mode.DIFFUSION else 1
        blocks = -(-self.params.max_new_tokens // width)
        return len(self.prompt_token_ids) + (blocks - 1) * width

    @property
    def needs_denoiser(self) -> bool:
        """Whether a denoiser leads it; otherwise the context tower's engine does it alone."""
        return self.params.mode is not Mode.AR


@across_versions
@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """How likely the context tower finds the tokens from position `start` on, each after all before it.

    1 <= `start` < len(`token_ids`): the first token follows nothing, so nothing says how likely it is. `priority`,
    `logprobs` and `cache_salt` as a Request's.
    """

    id: RequestId
    token_ids: tuple[int, ...]
    start: int
    priority: int = 0
    logprobs: int | None = None
    cache_salt: str | None = ""

    @property
    def positions(self) -> int:
        """Cache positions it fills: those of all tokens but the last, which is not read."""
        return len(self.token_ids) - 1

    @property
    def needs_denoiser(self) -> bool:
        return False


AnyRequest = Request | ScoreRequest


class Likelihood(NamedTuple):
    """How likely the context tower finds a committed token after all before it, in whatever mode it was decoded.

    `log_prob`: as in a ScoreEvent, of the raw logits: the request's temperature has no part in it. `top_token_ids` and
    `top_log_probs`: the likeliest tokens at its place, the likeliest first. `confidence`: in `diffusion`, the
    denoiser's probability of the token when it was fixed.
    """

    log_prob: float
    top_token_ids: tuple[int, ...] = ()
    top_log_probs: tuple[float, ...] = ()
    confidence: float | None = None


# Counts of a BlockEvent that add up.
COSTS = ("num_steps", "num_blocks", "num_drafted", "num_accepted", "num_ar_blocks", "num_diffusion_blocks")


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """Committed tokens of one request: a block in `diffusion`, a round's in `verified`, a token (or several, merged) in
    `ar` and `mock_ar`.

    `start` is the index of the first of them among the request's new tokens. `num_steps` counts denoiser steps. In
    `verified`, `num_blocks` counts rounds, `num_drafted` the tokens that the denoiser proposed in them, `num_accepted`
    those among them that the context tower would have written; the first token comes with the prompt, of no round.
    In `auto`, of its blocks `num_ar_blocks` were written by the context tower alone, `num_diffusion_blocks` by the
    denoiser; the others are rounds.
    The last event of a request carries a `finish_reason`; it may hold no tokens. It also tells the smallest margin of
    the request's decisions (`twotower.decoding.margins`): in fp32, only below 1e-5 might its tokens have been others.
    `likelihoods`: one for each token, where the request asks for them. `cached_tokens`, told with the first event: so
    many of the prompt's tokens were not read, because the context tower had read them for another request.
    """

    request_id: RequestId
    start: int
    token_ids: tuple[int, ...]
    num_steps: int
    num_blocks: int
    finish_reason: FinishReason | None = None
    margin: float | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    num_ar_blocks: int = 0
    num_diffusion_blocks: int = 0
    likelihoods: tuple[Likelihood, ...] = ()
    cached_tokens: int = 0

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None

    def first(self, count: int) -> "BlockEvent":
        """Its first `count` tokens with their cost. A block costs all of its steps and its whole draft, however few
        tokens are taken. In causal modes each token is a block, and costs its share of what was merged.
        """
        if count >= len(self.token_ids):
            return self
        blocks = min(count, self.num_blocks)
        costs = {name: getattr(self, name) * blocks // max(1, self.num_blocks) for name in COSTS}
        return replace(self, token_ids=self.token_ids[:count], likelihoods=self.likelihoods[:count], **costs)

    def after(self, count: int) -> "BlockEvent":
        """It without its first `count` tokens and what they cost."""
        head = self.first(count)
        costs = {name: getattr(self, name) - getattr(head, name) for name in COSTS}
        tokens, likelihoods = self.token_ids[count:], self.likelihoods[count:]
        start = self.start + count
        return replace(self, start=start, token_ids=tokens, likelihoods=likelihoods, cached_tokens=0, **costs)

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
            self.num_drafted + following.num_drafted,
            self.num_accepted + following.num_accepted,
            self.num_ar_blocks + following.num_ar_blocks,
            self.num_diffusion_blocks + following.num_diffusion_blocks,
            self.likelihoods + following.likelihoods,
            self.cached_tokens + following.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What one denoiser step fixed of a block. Told where the request asks for its trace; no part of the answer.

    The block fills `size` positions from `start` on, of which these `positions` are fixed now: indices among the
    request's new tokens. Some may lie behind the answer's end, since its last block runs whole. `step` counts the steps
    of the block from 0. `confidence`: the probability of each token at temperature 1. In `verified` the tokens are a
    draft, and the RoundEvent of the same `start` tells what becomes of them. With `structured_outputs` a position may
    be told again: what was there broke the grammar, and the last one stands.
    """

    request_id: RequestId
    start: int
    size: int
    step: int
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    confidence: tuple[float, ...]

    @property
    def is_last(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class RoundEvent:
    """What the context tower made of a draft (`verified`). Told as a StepEvent is, right before the round's BlockEvent.

    `draft` begins at `start`, an index among the request's new tokens. Its first `num_accepted` tokens stand, the
    others are rejected, and `token_id` is what the context tower wrote behind those that stand.
    """

    request_id: RequestId
    start: int
    draft: tuple[int, ...]
    num_accepted: int
    token_id: int

    @property
    def is_last(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class ScoreEvent:
    """The whole answer to a ScoreRequest, one entry for each token from its `start` on.

    `log_probs`: natural logarithms, the fp32 log-softmax of the context tower's fp32 logits. `is_greedy`: whether `ar`
    would have chosen this token at temperature 0; `margin` is the smallest of these decisions. `likelihoods`: the same
    with the likeliest tokens, where the request asks for them. `cached_tokens` as a BlockEvent's.
    """

    request_id: RequestId
    log_probs: tuple[float, ...]
    is_greedy: tuple[bool, ...]
    margin: float
    likelihoods: tuple[Likelihood, ...] = ()
    cached_tokens: int = 0

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
TraceEvent = StepEvent | RoundEvent
ToldEvent = AnswerEvent | TraceEvent  # of a request, until its last one
Event = ToldEvent | FailureEvent | ReleasedEvent
