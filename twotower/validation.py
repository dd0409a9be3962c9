"""The one place where a request is found good or bad, before any tower is touched.

Command line, HTTP and gRPC all come through here with a plain mapping, so that the same mistake gets the same words.
"""

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.errors import FieldError, InvalidRequest

MAX_SEED = 2**63 - 1
_UNSUPPORTED_IN_DIFFUSION = ("top_k", "top_p")
_ONLY_DIFFUSION = ("block_size", "steps_per_block", "confidence_threshold")


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a running checkpoint can be asked for. `defaults` fill in what a request leaves out."""

    vocab_size: int
    max_sequence_length: int
    modes: tuple[Mode, ...] = tuple(Mode)
    defaults: DecodingParams = field(default_factory=DecodingParams)


class Problems:
    """Collects everything wrong with a request, so that its author sees all of it at once."""

    def __init__(self) -> None:
        self._found: list[FieldError] = []

    def add(self, name: str, got: object, wanted: str) -> None:
        self._found.append(FieldError(name, f"got {_show(got)}, wanted {wanted}"))

    def say(self, name: str, message: str) -> None:
        self._found.append(FieldError(name, message))

    def extend(self, problems: Iterable[FieldError]) -> None:
        self._found.extend(problems)

    def raise_any(self) -> None:
        if self._found:
            raise InvalidRequest(self._found)


_Parser = Callable[[str, object, dict[str, object], Problems], None]


def draw_seed() -> int:
    """A seed for a request that brings none. It is recorded with the request."""
    return secrets.randbelow(MAX_SEED)


def parse_params(given: Mapping[str, object], limits: ModelLimits) -> DecodingParams:
    """Decoding parameters from a request's fields of the same names. Raises InvalidRequest with every problem.

    Only fields that were given appear in `given`; an unknown one is an error. Types are strict: no "5" for 5, no
    true for 1; a whole float passes for an int nowhere.
    """
    problems = Problems()
    known = {f.name for f in fields(DecodingParams)}
    for name in sorted(set(given) - known):
        problems.say(name, f"unknown field, wanted one of {', '.join(sorted(known))}")
    values: dict[str, object] = {}
    for name in known & set(given):
        _PARSERS[name](name, given[name], values, problems)
    problems.raise_any()
    mode = values.get("mode", limits.defaults.mode)
    _check_mode(mode, values, limits, problems)
    problems.raise_any()
    values.setdefault("seed", draw_seed())
    chosen = {name: values.get(name, getattr(limits.defaults, name)) for name in known}
    return DecodingParams(**chosen)  # type: ignore[arg-type]


def check_prompt(prompt_token_ids: Sequence[object], limits: ModelLimits) -> tuple[int, ...]:
    """The prompt as a tuple of ids, every one in range. Raises InvalidRequest."""
    problems = Problems()
    if not prompt_token_ids:
        problems.add("prompt", "an empty prompt", "at least one token")
    for place, token in enumerate(prompt_token_ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < limits.vocab_size:
            problems.add(f"prompt_token_ids[{place}]", token, f"a token id from 0 to {limits.vocab_size - 1}")
            break
    problems.raise_any()
    return tuple(prompt_token_ids)  # type: ignore[arg-type]


def make_request(
    request_id: str, prompt_token_ids: Sequence[object], given: Mapping[str, object], limits: ModelLimits
) -> Request:
    """A request that fits the running model. Raises InvalidRequest naming each field that does not."""
    prompt = check_prompt(prompt_token_ids, limits)
    request = Request(RequestId(request_id), prompt, parse_params(given, limits))
    wanted = len(prompt) + request.params.max_new_tokens
    if wanted > limits.max_sequence_length:
        raise InvalidRequest.of(
            "max_new_tokens",
            f"got a prompt of {len(prompt)} tokens and max_new_tokens {request.params.max_new_tokens} "
            f"({wanted} together), wanted at most {limits.max_sequence_length} together",
        )
    if request.positions > limits.max_sequence_length:
        raise InvalidRequest.of(
            "max_new_tokens",
            f"got {request.params.max_new_tokens} after a prompt of {len(prompt)} tokens, which takes "
            f"{request.positions} positions in whole blocks of {request.params.block_size}, "
            f"wanted at most {limits.max_sequence_length}",
        )
    return request


def _check_mode(mode: object, values: Mapping[str, object], limits: ModelLimits, problems: Problems) -> None:
    if mode not in limits.modes:
        can = ", ".join(limits.modes)
        problems.add("mode", str(mode), f"a mode this checkpoint can serve ({can})")
    if mode is Mode.DIFFUSION:
        for name in _UNSUPPORTED_IN_DIFFUSION:
            if name in values and values[name] not in (0, 1.0):
                problems.say(name, f"got {_show(values[name])}, but {name} is not supported in diffusion mode")
    else:
        for name in _ONLY_DIFFUSION:
            if name in values:
                problems.say(name, f"got {_show(values[name])}, but {name} has no meaning in {mode} mode")


def _show(value: object) -> str:
    text = value if isinstance(value, str) and value.startswith("an empty") else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _mode(name: str, value: object, out: dict[str, object], problems: Problems) -> None:
    try:
        out[name] = Mode(value)  # type: ignore[arg-type]
    except ValueError:
        problems.add(name, value, f"one of {', '.join(Mode)}")


def _integer(low: int, high: int | None = None) -> _Parser:
    def parse(name: str, value: object, out: dict[str, object], problems: Problems) -> None:
        within = f"at least {low}" if high is None else f"from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, int):
            problems.add(name, value, f"an integer {within}")
        elif value < low or (high is not None and value > high):
            problems.add(name, value, f"an integer {within}")
        else:
            out[name] = value

    return parse


def _number(low: float, high: float, low_open: bool = False) -> _Parser:
    def parse(name: str, value: object, out: dict[str, object], problems: Problems) -> None:
        bracket = "(" if low_open else "["
        wanted = f"a number in {bracket}{low:g}, {high:g}]" if high < math.inf else f"a finite number >= {low:g}"
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            problems.add(name, value, wanted)
        elif not low <= value <= high or (low_open and value == low):
            problems.add(name, value, wanted)
        else:
            out[name] = float(value)

    return parse


def _flag(name: str, value: object, out: dict[str, object], problems: Problems) -> None:
    if isinstance(value, bool):
        out[name] = value
    else:
        problems.add(name, value, "true or false")


def _token_ids(name: str, value: object, out: dict[str, object], problems: Problems) -> None:
    whole = isinstance(value, list | tuple) and all(isinstance(t, int) and not isinstance(t, bool) for t in value)
    if whole and all(t >= 0 for t in value):  # type: ignore[attr-defined]
        out[name] = tuple(value)  # type: ignore[arg-type]
    else:
        problems.add(name, value, "a list of token ids")


_PARSERS: dict[str, _Parser] = {
    "mode": _mode,
    "max_new_tokens": _integer(1),
    "block_size": _integer(1, 1024),
    "steps_per_block": _integer(1),
    "confidence_threshold": _number(0, 1),
    "temperature": _number(0, math.inf),
    "top_k": _integer(0),
    "top_p": _number(0, 1, low_open=True),
    "seed": _integer(0, MAX_SEED),
    "stop_token_ids": _token_ids,
    "ignore_eos": _flag,
}
