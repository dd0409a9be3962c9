"""What is asked of a service: a prompt with its options, or a continuation to score. Knows no face.

`Params` names each parameter as docs/parameters.md does; tests hold it to the service's own declarations. What a value
must be, the service says: here only what cannot be sent is refused.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

from twotower_client.errors import InvalidRequest

Mode = Literal["diffusion", "mock_ar", "ar", "verified", "auto"]
Floor = Literal["lossless", "confidence"]
MODES: tuple[Mode, ...] = get_args(Mode)
Prompt = str | Sequence[int]
MAX_TIMEOUT_S = 1_000_000.0  # what is much longer, gRPC takes for no time at all


class Params(TypedDict, total=False):
    """How to decode; what is left out, or None, takes the service's default."""

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
    """Beside the parameters. `timeout_s`: for the whole call with all its attempts; None: the client's own.
    `request_id`: a label for logs; where none is given, one is drawn."""

    priority: int
    request_id: str
    timeout_s: float | None


class Options(Params, Common, total=False):
    """Of a whole answer. `logprobs`: tell how likely each token is, with so many alternatives. `echo`: begin with the
    prompt again; over HTTP only."""

    stop: str | Sequence[str]
    logprobs: int | None
    echo: bool


class StreamOptions(Params, Common, total=False):
    """Of a stream. `trace`: tell what each denoiser step fixes, as Step and Round events."""

    stop: str | Sequence[str]
    logprobs: int | None
    trace: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for an answer, the same in all attempts. `params`: only what was given."""

    prompt: Prompt
    request_id: str
    params: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    priority: int = 0
    logprobs: int | None = None
    echo: bool = False
    trace: bool = False


@dataclass(frozen=True, slots=True)
class ScoreAsk:
    """A request for a score."""

    prompt: Prompt
    continuation: Prompt
    request_id: str
    priority: int = 0


def ask_of(prompt: Prompt, options: Mapping[str, Any]) -> tuple[Ask, float | None]:
    """The request, and its timeout. Raises TypeError for an option that there is not, InvalidRequest for a prompt that
    is none."""
    given = dict(options)
    timeout_s = checked_timeout(given.pop("timeout_s", None))
    request_id = given.pop("request_id", "") or drawn_id()
    params = {name: given.pop(name) for name in Params.__annotations__ if name in given}
    unknown = given.keys() - {"stop", "priority", "logprobs", "echo", "trace"}
    if unknown:
        raise TypeError(f"got an unexpected option {sorted(unknown)[0]!r}")
    stop = given.pop("stop", ())
    known = {name: value for name, value in params.items() if value is not None}
    ask = Ask(
        checked_prompt("prompt", prompt, request_id),
        request_id,
        known,
        (stop,) if isinstance(stop, str) else tuple(stop),
        **given,
    )
    return ask, timeout_s


def score_ask_of(prompt: Prompt, continuation: Prompt, options: Mapping[str, Any]) -> tuple[ScoreAsk, float | None]:
    """As `ask_of`."""
    unknown = options.keys() - Common.__annotations__.keys()
    if unknown:
        raise TypeError(f"got an unexpected option {sorted(unknown)[0]!r}")
    request_id = options.get("request_id") or drawn_id()
    parts = [
        checked_prompt(name, part, request_id) for name, part in (("prompt", prompt), ("continuation", continuation))
    ]
    ask = ScoreAsk(parts[0], parts[1], request_id, options.get("priority", 0))
    return ask, checked_timeout(options.get("timeout_s"))


def drawn_id() -> str:
    return f"client-{uuid.uuid4().hex}"


def checked_prompt(name: str, prompt: object, request_id: str) -> Prompt:
    """Text, or token ids as a tuple."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not all(map(_is_id, prompt)):
        kind = type(prompt).__name__
        raise InvalidRequest.of(name, f"got a {kind}, wanted text or a list of token ids", request_id)
    return tuple(prompt)


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
