"""The nouns of the whole library: requests, parameters, events.

Plain data without torch. The engine knows only token ids; the owner of the tokenizer handles text.
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
        """Whether each token is an event of its own. Events of such modes may be merged on their way."""
        return self in (Mode.AR, Mode.MOCK_AR)


class Floor(StrEnum):
    """The modes that `auto` may choose: with `lossless` those that give `ar`'s tokens, with `confidence` also
    `diffusion`.
    """

    LOSSLESS = "lossless"
    CONFIDENCE = "confidence"


class FinishReason(StrEnum):
    """Why a request ended without an error."""

    STOP = "stop"
    LENGTH = "length"


GREEDY_BELOW = 1e-5  # a temperature that only fp32 overflow tells from 0
MAX_COUNT = 2**31 - 1  # of tokens, of candidates: more than any model has
MAX_BLOCK = 1024
# The mask token is excluded by a logit of -1e12, which a larger temperature would admit again.
MAX_TEMPERATURE = 1000
MAX_SEED = 2**63 - 1
MAX_STOP_TOKEN_IDS = 64
MAX_BIASED_TOKENS, MAX_BIAS = 512, 100.0  # as many as a JSON object may have names
MAX_CONSTRAINT_BYTES = 32 * 1024
MAX_PENALTY, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 2.0, 0.01, 10.0
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 256
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1
MAX_ALTERNATIVES = 20
MAX_LIKELIHOODS = 2**18  # tokens times alternatives of one call: 2 kB for each token with all alternatives

_AUTO = (Mode.AUTO,)
_DIFFUSION, _VERIFIED = (Mode.DIFFUSION, *_AUTO), (Mode.VERIFIED, *_AUTO)
_BLOCKS, _CAUSAL = (Mode.DIFFUSION, *_VERIFIED), (Mode.AR, Mode.MOCK_AR, *_VERIFIED)
# Parameters of `diffusion`, and of causal modes; in `auto` they require this floor.
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
    """How to decode one request. Names and meanings are the released script's. This is the only declaration of each
    parameter.

    `seed` decides every random number of the request, together with block, step and position. `twotower.validation`
    checks the values, not this class. A new parameter comes last.
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
        "γ: a step fixes the positions whose probability is strictly above γ; 0: the whole block in one step, "
        "1: one position per step",
        _DIFFUSION,
        http="diffusion.confidence_threshold",
        by_service=True,
    ).field
    temperature: float = Parameter(
        0.0,
        Number(0, MAX_TEMPERATURE),
        "0 is greedy: `seed`, `top_k` and `top_p` are accepted, but then have no effect",
        by_service=True,
    ).field
    top_k: int = Parameter(0, Integer(0, MAX_COUNT), "sample among this many of the likeliest tokens", off=0).field
    top_p: float = Parameter(
        1.0,
        Number(0, 1, low_open=True),
        "sample among the likeliest tokens whose probabilities add up to this",
        off=1.0,
    ).field
    seed: int = Parameter(
        0,
        Integer(0, MAX_SEED),
        "decides every random number, whatever else is in the batch",
        drawn=True,
        default_is="drawn and returned",
    ).field
    stop_token_ids: tuple[int, ...] = Parameter(
        (), TokenIds(MAX_STOP_TOKEN_IDS), "end the sequence like EOS; the stopping token is kept"
    ).field
    ignore_eos: bool = Parameter(False, Flag(), "continue after the checkpoint's EOS").field
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
        "a step of a draft fixes the positions whose probability is strictly above it; never changes a token",
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
        "sample among tokens with at least this share of the likeliest token's probability",
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
        "is subtracted from the logit of each token that is in the answer already",
        _CAUSAL,
        off=0.0,
    ).field
    frequency_penalty: float = Parameter(
        0.0,
        Number(-MAX_PENALTY, MAX_PENALTY),
        "is subtracted from a token's logit once for each time that the token is in the answer already",
        _CAUSAL,
        off=0.0,
    ).field
    repetition_penalty: float = Parameter(
        1.0,
        Number(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
        "divides the logit of each token that is in prompt or answer already; multiplies a logit below 0",
        _CAUSAL,
        off=1.0,
    ).field

    structured_outputs: Constraint | None = Parameter(
        None,
        Constraints(MAX_CONSTRAINT_BYTES),
        "the text matches this description: EOS may come only where the text is complete; needs a tokenizer",
        default_is="any text",
    ).field

    @property
    def penalises(self) -> bool:
        """Whether a token's logit depends on the tokens before it through a penalty."""
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
    "the text ends before the first of these strings, `token_ids` with the token that completes it; needs a tokenizer",
    http="stop",
)
PRIORITY = Parameter(
    0,
    Integer(MIN_PRIORITY, MAX_PRIORITY),
    "among waiting requests, lower goes first; never changes tokens",
    http="priority",
)
TRACE = Parameter(
    False,
    Flag(),
    "show in a stream which positions each step fixes; never changes a token",
    _BLOCKS,
    off=False,
    http="diffusion.trace",
)
LOGPROBS = Parameter(
    None,
    Integer(0, MAX_ALTERNATIVES),
    "return each token's log-probability under the context tower, and this many of the likeliest tokens at its place; "
    "never changes a token",
    http="logprobs",
    default_is="none",
)


@across_versions
@dataclass(frozen=True, slots=True)
class Request:
    """The user's request, as token ids. Immutable; its decoding state is a *sequence*.

    `priority` decides when it starts, never its tokens: a lower value goes first (`twotower.engine.ledger`).
    `committed`: its first new tokens, if it was begun elsewhere (in `diffusion` whole blocks). Its events continue
    after them, from `start` == len(`committed`); in `auto` the context tower wrote them. `trace`: whether to emit
    TraceEvents. `logprobs`: whether each token has a Likelihood, and with how many alternatives. `cache_salt`: only
    requests with the same salt share prefixes; None: the whole prompt is read, and none of it is kept.
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
        """The tokens with which its sequence begins: the prompt, and the committed part of the answer."""
        return self.prompt_token_ids + self.committed

    @property
    def positions(self) -> int:
        """Cache positions this request may fill at most: the prompt and every block but the last, which is not read.

        In `verified` no more of a draft is read than the answer may still take, so tokens count instead of blocks.
        `auto` has the same room. With likelihoods, tokens that a denoiser decided are read to the last one, because
        likelihoods follow from the reading.
        """
        if self.logprobs is not None and self.params.mode in (Mode.DIFFUSION, Mode.MOCK_AR, Mode.AUTO):
            return len(self.prompt_token_ids) + self.params.max_new_tokens
        width = self.params.block_size if self.params.mode is Mode.DIFFUSION else 1
        blocks = -(-self.params.max_new_tokens // width)
        return len(self.prompt_token_ids) + (blocks - 1) * width

    @property
    def needs_denoiser(self) -> bool:
        """Whether a denoiser leads it; otherwise the context tower's engine decodes it alone."""
        return self.params.mode is not Mode.AR


@across_versions
@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Asks for the context tower's log-probability of each token from position `start` on, after all tokens before it.

    1 <= `start` < len(`token_ids`): the first token follows nothing, so it has no probability. `priority`, `logprobs`
    and `cache_salt` as in a Request.
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
    """A committed token's log-probability under the context tower, after all tokens before it, in any mode.

    `log_prob`: from the raw logits, as in a ScoreEvent; the request's temperature does not change it. `top_token_ids`
    and `top_log_probs`: the likeliest tokens at its place, the likeliest first. `confidence`: in `diffusion`, the
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

    `start` is the index of the first token among the request's new tokens. `num_steps` counts denoiser steps. In
    `verified`, `num_blocks` counts rounds, `num_drafted` the tokens that the denoiser proposed, and `num_accepted` the
    proposed tokens that were accepted. The first token comes with the prompt and belongs to no round. In `auto` the
    context tower wrote `num_ar_blocks` of the blocks alone, and the denoiser `num_diffusion_blocks`; the others are
    rounds. The last event of a request has a `finish_reason` and may hold no tokens. It also has the smallest margin of
    the request's decisions (`twotower.decoding.margins`): in fp32 its tokens might differ only if this is below 1e-5.
    `likelihoods`: one for each token, if the request asks for them. `cached_tokens`, in the first event: the number of
    the prompt's tokens that came from the prefix cache.
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
        tokens are taken. In causal modes each token is a block, and costs its share of the merged event.
        """
        if count >= len(self.token_ids):
            return self
        blocks = min(count, self.num_blocks)
        costs = {name: getattr(self, name) * blocks // max(1, self.num_blocks) for name in COSTS}
        return replace(self, token_ids=self.token_ids[:count], likelihoods=self.likelihoods[:count], **costs)

    def after(self, count: int) -> "BlockEvent":
        """The event without its first `count` tokens and their cost."""
        head = self.first(count)
        costs = {name: getattr(self, name) - getattr(head, name) for name in COSTS}
        tokens, likelihoods = self.token_ids[count:], self.likelihoods[count:]
        start = self.start + count
        return replace(self, start=start, token_ids=tokens, likelihoods=likelihoods, cached_tokens=0, **costs)

    def joined(self, following: "BlockEvent") -> "BlockEvent":
        """This event and the request's next one, merged."""
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
    """The positions of a block that one denoiser step fixed. Emitted if the request asks for a trace; not part of the
    answer.

    The block fills `size` positions from `start` on. `positions` are those fixed by this step, as indices among the
    request's new tokens. Some may lie behind the answer's end, because the last block runs whole. `step` counts the
    steps of the block from 0. `confidence`: the probability of each token at temperature 1. In `verified` the tokens
    are a draft, and the RoundEvent with the same `start` has the verdict. With `structured_outputs` a position may be
    reported again, because its token broke the grammar; the last report holds.
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
    """The context tower's verdict on a draft (`verified`). Emitted like a StepEvent, right before the round's
    BlockEvent.

    `draft` begins at `start`, an index among the request's new tokens. Its first `num_accepted` tokens are accepted,
    the others are rejected. `token_id` is what the context tower wrote after the accepted tokens.
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
    with the likeliest tokens, if the request asks for them. `cached_tokens` as in a BlockEvent.
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
