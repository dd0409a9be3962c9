"""A service's answers: whole answers, events of a stream, scores, the model. Plain data, the same over both faces."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Usage:
    """The cost of an answer, or of a block of it.

    `num_steps` counts denoiser forwards, `num_blocks` commits, in `verified` rounds. `num_drafted` counts the tokens
    that the denoiser proposed in rounds, `num_accepted` the accepted ones. In `auto` the context tower wrote
    `num_ar_blocks` of the blocks alone, and the denoiser `num_diffusion_blocks`. `cached_tokens`: tokens of the prompt
    that the service had read for another request.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_steps: int = 0
    num_blocks: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_ar_blocks: int = 0
    num_diffusion_blocks: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def tokens_per_step(self) -> float | None:
        """None without steps, as in `ar`."""
        return self.completion_tokens / self.num_steps if self.num_steps else None

    def less(self, before: "Usage") -> "Usage":
        """The difference from an earlier usage."""
        return Usage(*(getattr(self, one.name) - getattr(before, one.name) for one in fields(self)))

    def plus(self, more: "Usage") -> "Usage":
        return Usage(*(getattr(self, one.name) + getattr(more, one.name) for one in fields(self)))


@dataclass(frozen=True, slots=True)
class Alternative:
    """A likely token at some place. `text`: the token on its own, for display. `token_id` is None over HTTP, which
    sends only the text.
    """

    text: str
    log_prob: float
    token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Likelihood:
    """A token's log-probability under the context tower, after all tokens before it; None for a prompt's first token.

    `confidence`: in `diffusion`, the denoiser's probability of the token when it was fixed. `text`: the token on its
    own, for display. Over HTTP the token itself is among the `top` ones.
    """

    log_prob: float | None
    top: tuple[Alternative, ...] = ()
    confidence: float | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """Committed tokens, which never change, and the text that became certain with them. `usage`: their cost. `choice`,
    as in all events: the answer's number among the `n`.
    """

    start: int
    token_ids: tuple[int, ...]
    text: str
    usage: Usage
    likelihoods: tuple[Likelihood, ...] = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """The positions of a block that one denoiser step fixed; sent with `trace`. In `verified` the tokens
    are a draft.
    """

    start: int
    size: int
    step: int
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    confidence: tuple[float, ...]
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Round:
    """The context tower's verdict on a draft; sent with `trace`."""

    start: int
    draft: tuple[int, ...]
    draft_texts: tuple[str, ...]
    num_accepted: int
    token_id: int
    text: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of an answer; a stream has `n` of them. `usage`: that answer's own.

    `mode` is None over HTTP if the request named none.
    """

    finish_reason: FinishReason
    usage: Usage
    seed: int
    mode: str | None
    choice: int = 0


Event = Block | Step | Round | Finished


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer.

    `text` is empty if the service has no tokenizer. `request_id`: the caller's label. `service_id`: the request's id in
    the service's log, if known. `attempts`: how often the request was sent. `others`: the answers after the first, if
    `n` asks for several. `usage`: of all decoded answers, with the prompt counted once.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    seed: int
    mode: str | None
    request_id: str
    service_id: str = ""
    likelihoods: tuple[Likelihood, ...] = ()
    attempts: int = 1
    others: tuple["Answer", ...] = ()

    def after(self, attempts: int) -> "Answer":
        """The same, for a request that was sent so often."""
        return replace(self, attempts=attempts, others=tuple(one.after(attempts) for one in self.others))


@dataclass(frozen=True, slots=True)
class Score:
    """The natural log-probability of each token of a continuation under the context tower. `is_greedy`: whether `ar` at
    temperature 0 would have chosen the token. `cached_tokens` as in a Usage; for several continuations, the first
    one's.
    """

    prompt_tokens: int
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    is_greedy: tuple[bool, ...]
    sum_log_prob: float
    request_id: str
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model. Fields that only gRPC has are None over HTTP."""

    name: str
    modes: tuple[str, ...]
    max_sequence_length: int
    checkpoint_fingerprint: str
    checkpoint_layout: str | None = None
    vocab_size: int | None = None
    has_tokenizer: bool | None = None
    defaults: Mapping[str, object] | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the service is ready, and for each mode whether it is served now. `reason`: why it is not ready."""

    ready: bool
    modes: Mapping[str, bool] = field(default_factory=dict)
    reason: str = ""


class Gathering:
    """The events of a stream, put together."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.attempts = 1
        self._blocks: dict[int, list[Block]] = {}  # by choice
        self._ends: dict[int, Finished] = {}

    def add(self, event: Event) -> None:
        if isinstance(event, Block):
            self._blocks.setdefault(event.choice, []).append(event)
        elif isinstance(event, Finished):
            self._ends[event.choice] = event

    @property
    def finished(self) -> Finished | None:
        """The end of the first answer, once it has ended."""
        return self._ends.get(0)

    @property
    def text(self) -> str:
        """Of the first answer, so far."""
        return "".join(block.text for block in self._blocks.get(0, ()))

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first answer, so far."""
        return tuple(token for block in self._blocks.get(0, ()) for token in block.token_ids)

    def answer(self) -> Answer:
        """Of a stream that has ended."""
        assert 0 in self._ends, "a stream ends with Finished or an error"
        usages = [end.usage for end in self._ends.values()]
        read = {"prompt_tokens": usages[0].prompt_tokens, "cached_tokens": usages[0].cached_tokens}
        usage = replace(reduce(Usage.plus, usages), **read)
        first, *others = (self._answer(choice, usage) for choice in sorted(self._ends))
        return replace(first, others=tuple(others))

    def _answer(self, choice: int, usage: Usage) -> Answer:
        end, blocks = self._ends[choice], self._blocks.get(choice, [])
        return Answer(
            "".join(block.text for block in blocks),
            tuple(token for block in blocks for token in block.token_ids),
            end.finish_reason,
            usage,
            end.seed,
            end.mode,
            self.request_id,
            likelihoods=tuple(one for block in blocks for one in block.likelihoods),
            attempts=self.attempts,
        )
