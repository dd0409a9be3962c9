"""Requests to a service: a prompt or a chat with its options, or a continuation to score. Knows no face.

`Params` names each parameter as docs/parameters.md does; tests compare it with the service's declarations. The service
checks values; the client refuses only what cannot be sent.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Required, TypedDict, get_args

from twotower_client.errors import InvalidRequest

Mode = Literal["diffusion", "mock_ar", "ar", "verified", "auto"]
Floor = Literal["lossless", "confidence"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_TIMEOUT_S = 1_000_000.0  # gRPC takes a much longer time for none


class Message(TypedDict, total=False):
    """A message of a chat. `role`: system, developer, user or assistant."""

    role: Required[str]
    content: Required[str]
    name: str


Prompt = str | Sequence[int] | Sequence[Message]  # the last is a chat


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages that the service's template turns into the prompt."""

    messages: tuple[Mapping[str, str], ...]


class Params(TypedDict, total=False):
    """How to decode. A parameter that is left out or None takes the service's default."""

    mode: Mode | None
    max_new_tokens: int | None
    block_size: int | None
    steps_per_block: int | None
    confidence_threshold: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    draft_steps: int | None
    draft_threshold: float | None
    floor: Floor | None
    min_p: float | None
    min_tokens: int | None
    logit_bias: Mapping[int, float] | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    structured_outputs: Mapping[str, Any] | None


class Common(TypedDict, total=False):
    """Options of every call. `timeout_s`: for the whole call with all its attempts; None: the client's own.
    `request_id`: a label for logs; drawn if not given.
    """

    priority: int
    request_id: str
    timeout_s: float | None


class Answering(Params, Common, total=False):
    """Options of an answer, whole or as a stream. `logprobs`: each token's log-probability, with so many alternatives.
    `n`: so many answers, each with its own seed. `include_stop_str_in_output`: the text ends after a stop string.
    `add_special_tokens`: whether the tokenizer adds special tokens; None: for a prompt, not for a chat.
    """

    stop: str | Sequence[str]
    logprobs: int | None
    n: int | None
    include_stop_str_in_output: bool
    add_special_tokens: bool | None


class Options(Answering, total=False):
    """Options of a whole answer. `best_of`: decode so many answers and return the likeliest `n`. `echo`: begin with the
    prompt; with max_new_tokens=0 nothing is decoded.
    """

    best_of: int | None
    echo: bool


class StreamOptions(Answering, total=False):
    """Options of a stream. `trace`: show what each denoiser step fixes, as Step and Round events."""

    trace: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for an answer, the same in all attempts. `params`: only given values."""

    prompt: str | tuple[int, ...] | Chat
    request_id: str
    params: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    priority: int = 0
    logprobs: int | None = None
    n: int | None = None
    best_of: int | None = None
    include_stop_str_in_output: bool = False
    add_special_tokens: bool | None = None
    echo: bool = False
    trace: bool = False

    def check_whole(self) -> None:
        """Raises InvalidRequest for options that only a stream has."""
        if self.trace:
            raise InvalidRequest.of("trace", "got true, wanted it only with a stream", self.request_id)

    def check_streams(self) -> None:
        """Raises InvalidRequest for options that no stream has."""
        if self.echo:
            raise InvalidRequest.of("echo", "got true, wanted it only without a stream", self.request_id)
        if self.best_of is not None:
            raise InvalidRequest.of("best_of", f"got {self.best_of}, wanted it only without a stream", self.request_id)


_BESIDE = {one.name for one in fields(Ask)} - {"prompt", "request_id", "params", "stop"}


@dataclass(frozen=True, slots=True)
class ScoreAsk:
    """A request for scores of at least one continuation of one prompt. All continuations are text, or all are token
    ids.
    """

    prompt: str | tuple[int, ...]
    continuations: tuple[str | tuple[int, ...], ...]
    request_id: str
    priority: int = 0


def ask_of(prompt: Prompt, options: Mapping[str, Any]) -> tuple[Ask, float | None]:
    """The request, and its timeout. Raises TypeError for an unknown option, and InvalidRequest for an
    invalid prompt.
    """
    given = dict(options)
    timeout_s = checked_timeout(given.pop("timeout_s", None))
    request_id = given.pop("request_id", "") or drawn_id()
    params = {name: given.pop(name) for name in Params.__annotations__ if name in given}
    unknown = given.keys() - _BESIDE - {"stop"}
    if unknown:
        raise TypeError(f"got an unexpected option {sorted(unknown)[0]!r}")
    stop = given.pop("stop", ())
    known = {name: value for name, value in params.items() if value is not None}
    ask = Ask(
        chat_or_prompt("prompt", prompt, request_id),
        request_id,
        known,
        (stop,) if isinstance(stop, str) else tuple(stop),
        **given,
    )
    return ask, timeout_s


def score_ask_of(prompt: Prompt, continuation: Prompt, options: Mapping[str, Any]) -> tuple[ScoreAsk, float | None]:
    """As `ask_of`."""
    return _score_ask(prompt, [("continuation", continuation)], options)


def scores_ask_of(
    prompt: Prompt, continuations: Sequence[Prompt], options: Mapping[str, Any]
) -> tuple[ScoreAsk, float | None]:
    """As `ask_of`."""
    given: object = continuations  # because callers may ignore the annotation
    if isinstance(given, str) or not isinstance(given, Sequence):
        got = f"a {type(given).__name__}"
        raise InvalidRequest.of("continuations", f"got {got}, wanted a list of texts or of lists of token ids")
    if not given:
        raise InvalidRequest.of("continuations", "got none, wanted a list of texts or of lists of token ids")
    return _score_ask(prompt, [(f"continuations[{place}]", one) for place, one in enumerate(continuations)], options)


def _score_ask(
    prompt: Prompt, named: Sequence[tuple[str, Prompt]], options: Mapping[str, Any]
) -> tuple[ScoreAsk, float | None]:
    unknown = options.keys() - Common.__annotations__.keys()
    if unknown:
        raise TypeError(f"got an unexpected option {sorted(unknown)[0]!r}")
    request_id = options.get("request_id") or drawn_id()
    first, *parts = [checked_prompt(name, part, request_id) for name, part in (("prompt", prompt), *named)]
    if len({isinstance(part, str) for part in parts}) > 1:
        raise InvalidRequest.of("continuations", "got texts and token ids, wanted one of them", request_id)
    ask = ScoreAsk(first, tuple(parts), request_id, options.get("priority", 0))
    return ask, checked_timeout(options.get("timeout_s"))


def drawn_id() -> str:
    return f"client-{uuid.uuid4().hex}"


def chat_or_prompt(name: str, given: object, request_id: str = "") -> str | tuple[int, ...] | Chat:
    """A list whose first member is an object is a chat. Raises InvalidRequest."""
    if isinstance(given, Sequence) and given and isinstance(given[0], Mapping):
        return Chat(tuple(_checked_message(place, one, request_id) for place, one in enumerate(given)))
    return checked_prompt(name, given, request_id)


def _checked_message(place: int, given: object, request_id: str) -> Mapping[str, str]:
    if not isinstance(given, Mapping) or not given.keys() <= Message.__annotations__.keys():
        told = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        wanted = "wanted an object with role, content and, if there is one, name"
        raise InvalidRequest.of(f"messages[{place}]", f"got {told}, {wanted}", request_id)
    for name in Message.__annotations__:
        if not isinstance(given.get(name, "" if name == "name" else None), str):
            told = type(given.get(name)).__name__ if name in given else "none"
            raise InvalidRequest.of(f"messages[{place}].{name}", f"got {told}, wanted text", request_id)
    return dict(given)


def checked_prompt(name: str, prompt: object, request_id: str) -> str | tuple[int, ...]:
    """Text, or token ids as a tuple."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not all(map(_is_id, prompt)):
        kind = type(prompt).__name__
        raise InvalidRequest.of(name, f"got a {kind}, wanted text or a list of token ids", request_id)
    return tuple(prompt)


def text_or_chat(given: object) -> str | Chat:
    """Raises InvalidRequest for token ids, and for anything that is not a prompt."""
    prompt = chat_or_prompt("text", given)
    if isinstance(prompt, tuple):
        raise InvalidRequest.of("text", "got token ids, wanted text or a chat's messages")
    return prompt


def checked_ids(token_ids: object) -> tuple[int, ...]:
    """Raises InvalidRequest for what are no token ids."""
    if isinstance(token_ids, str):
        raise InvalidRequest.of("token_ids", "got text, wanted a list of token ids")
    ids = checked_prompt("token_ids", token_ids, "")
    assert isinstance(ids, tuple)
    return ids


def checked_timeout(timeout_s: float | None) -> float | None:
    if timeout_s is not None and not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise ValueError(f"timeout_s: got {timeout_s}, wanted seconds, above 0 and at most {MAX_TIMEOUT_S:g}")
    return timeout_s


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
