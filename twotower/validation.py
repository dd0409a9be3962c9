"""The one place where a request is found good or bad, before any tower is touched.

Command line, HTTP and gRPC all come through here with a plain mapping, so that the same mistake gets the same words.
"""

import heapq
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

from twotower.core import DecodingParams, Mode, Request, RequestId, ScoreRequest
from twotower.errors import FieldError, InvalidRequest

MAX_SEED = 2**63 - 1
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 256
MAX_STOP_TOKEN_IDS = 64
MAX_COUNT = 2**31 - 1  # of tokens, of candidates: more than any model has
_NAMED = 8  # unknown fields that are told by name
_SHOWN = 60  # characters of a value or a name in a message
MAX_BLOCK = 1024
# The mask token is held out of the choice by a logit of -1e12, which a larger temperature would let back in.
MAX_TEMPERATURE = 1000
_OFF_IN_DIFFUSION = {"top_k": 0, "top_p": 1.0}
_ONLY_DIFFUSION = ("block_size", "steps_per_block", "confidence_threshold")


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a running checkpoint can be asked for. `defaults` fill in what a request leaves out."""

    vocab_size: int
    max_sequence_length: int
    modes: tuple[Mode, ...] = tuple(Mode)
    defaults: DecodingParams = field(default_factory=DecodingParams)


_Checked = TypeVar("_Checked")


class Problems:
    """Collects everything wrong with a request, so that its author sees all of it at once."""

    def __init__(self) -> None:
        self._found: list[FieldError] = []

    def add(self, name: str, got: object, wanted: str) -> None:
        self._found.append(FieldError(name, f"got {show(got)}, wanted {wanted}"))

    def say(self, name: str, message: str) -> None:
        self._found.append(FieldError(name, message))

    def of(self, check: Callable[[], _Checked], otherwise: _Checked) -> _Checked:
        """What `check` returns; where it raises InvalidRequest, `otherwise`, and its problems are collected."""
        try:
            return check()
        except InvalidRequest as error:
            self._found.extend(error.problems)
            return otherwise

    def raise_any(self) -> None:
        if self._found:
            raise InvalidRequest(self._found)


_Parser = Callable[[str, object, dict[str, object], Problems], None]


def draw_seed() -> int:
    """A seed for a request that brings none. It is recorded with the request."""
    # A double holds it, and so does every reader of JSON.
    return secrets.randbelow(2**53)


def parse_params(given: Mapping[str, object], limits: ModelLimits) -> DecodingParams:
    """Decoding parameters from a request's fields of the same names. Raises InvalidRequest with every problem.

    Only fields that were given appear in `given`; an unknown one is an error. Types are strict: no "5" for 5, no
    true for 1; a whole float passes for an int nowhere.
    """
    values = check_values(given)
    problems = Problems()
    mode = values.get("mode", limits.defaults.mode)
    _check_mode(mode, values, limits, problems)
    _check_ids("stop_token_ids", values.get("stop_token_ids", ()), limits.vocab_size, problems)
    problems.raise_any()
    values.setdefault("seed", draw_seed())
    chosen = {name: values.get(name, getattr(limits.defaults, name)) for name in _PARSERS}
    return DecodingParams(**chosen)  # type: ignore[arg-type]


def check_values(given: Mapping[str, object]) -> dict[str, object]:
    """The fields of `given` as DecodingParams has them, each looked at alone: its type, its range, no model, no mode.

    Raises InvalidRequest with every problem.
    """
    problems = Problems()
    check_known(given, _PARSERS, problems)
    values: dict[str, object] = {}
    for name in sorted(_PARSERS.keys() & given.keys()):
        _PARSERS[name](name, given[name], values, problems)
    problems.raise_any()
    return values


def check_integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """Raises InvalidRequest."""
    problems = Problems()
    checked: dict[str, object] = {}
    _integer(low, high)(name, value, checked, problems)
    problems.raise_any()
    return checked[name]  # type: ignore[return-value]


def check_priority(priority: object) -> int:
    """Raises InvalidRequest."""
    return check_integer("priority", priority, MIN_PRIORITY, MAX_PRIORITY)


def check_token_ids(name: str, token_ids: Sequence[object], vocab_size: int) -> tuple[int, ...]:
    """Every one of them in range. Raises InvalidRequest that names the first which is not."""
    problems = Problems()
    ids = _check_ids(name, token_ids, vocab_size, problems)
    problems.raise_any()
    return ids


def check_prompt(prompt_token_ids: Sequence[object], limits: ModelLimits) -> tuple[int, ...]:
    """The prompt as a tuple of ids, every one in range. Raises InvalidRequest."""
    problems = Problems()
    prompt = _tokens_of("prompt", prompt_token_ids, limits, problems)
    problems.raise_any()
    return prompt


def parse_stop(stop: object) -> tuple[str, ...]:
    """Stop strings: one, or a list of them. Raises InvalidRequest."""
    strings = [stop] if isinstance(stop, str) else stop
    if isinstance(strings, str | bytes) or not isinstance(strings, Sequence):
        raise _no_stop(stop)
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest.of("stop", f"got {len(strings)} strings, wanted at most {MAX_STOP_STRINGS}")
    for text in strings:
        if isinstance(text, str) and text:
            check_length("stop", text, MAX_STOP_CHARACTERS)
    if not all(isinstance(text, str) and text for text in strings):
        raise _no_stop(stop if isinstance(stop, str) else list(strings))
    return tuple(strings)


def _no_stop(got: object) -> InvalidRequest:
    return InvalidRequest.of("stop", f"got {show(got)}, wanted a string or a list of strings, none of them empty")


def check_length(name: str, text: object, most: int) -> str:
    """A string of whole Unicode characters, `most` at most. Raises InvalidRequest."""
    if isinstance(text, str) and len(text) > most:
        raise InvalidRequest.of(name, f"got a string of {len(text)} characters, wanted at most {most}")
    return check_text(name, text)


def check_bytes(name: str, text: object, tokens: int, bytes_per_token: int) -> str:
    """Text that may have no more than `tokens` tokens, which none has that is longer than so many of the longest.

    Raises InvalidRequest. To be asked before the text is tokenized, which takes far longer.
    """
    known = check_text(name, text)
    size, most = len(known.encode()), tokens * bytes_per_token
    if size > most:
        raise InvalidRequest.of(
            name,
            f"got {size} bytes of text, wanted at most {most}: {tokens} tokens of no more than {bytes_per_token} bytes",
        )
    return known


def check_text(name: str, text: object) -> str:
    """`text` as it is, if it is a string of whole Unicode characters. Raises InvalidRequest."""
    if not isinstance(text, str):
        raise InvalidRequest.of(name, f"got {show(text)}, wanted a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest.of(
            name, "got text with half a surrogate pair or broken UTF-8 in it, wanted whole Unicode characters"
        ) from None
    return text


def check_known(given: Iterable[str], known: Iterable[str], problems: Problems) -> None:
    """Adds a problem for each field that is not a known one, for the first few of them."""
    wanted = sorted(known)
    for name in heapq.nsmallest(_NAMED, set(given) - set(wanted)):
        problems.say(show_name(name), f"unknown field, wanted one of {', '.join(wanted)}")


def make_request(
    request_id: str,
    prompt_token_ids: Sequence[object],
    given: Mapping[str, object],
    limits: ModelLimits,
    priority: object = 0,
) -> Request:
    """A request that fits the running model. Raises InvalidRequest naming each field that does not.

    A max_new_tokens that is not given is the default, or what room the prompt leaves where that is less.
    """
    problems = Problems()
    prompt = problems.of(lambda: check_prompt(prompt_token_ids, limits), tuple[int, ...]())
    room = limits.max_sequence_length - len(prompt)
    if "max_new_tokens" not in given:
        if room < 1:
            wanted = f"wanted at most {limits.max_sequence_length - 1}, so that one more fits after them"
            problems.say("prompt", f"got {len(prompt)} tokens, {wanted}")
        given = {**given, "max_new_tokens": min(limits.defaults.max_new_tokens, max(room, 1))}
    params = problems.of(lambda: parse_params(given, limits), limits.defaults)
    order = problems.of(lambda: check_priority(priority), 0)
    problems.raise_any()
    request = Request(RequestId(request_id), prompt, params, priority=order)
    together = len(prompt) + request.params.max_new_tokens
    if together > limits.max_sequence_length:
        raise InvalidRequest.of(
            "max_new_tokens",
            f"got {request.params.max_new_tokens} after a prompt of {len(prompt)} tokens ({together} together), "
            f"wanted at most {limits.max_sequence_length} together",
        )
    return request


def make_score_request(
    request_id: str,
    prompt_token_ids: Sequence[object],
    continuation_token_ids: Sequence[object],
    limits: ModelLimits,
    priority: object = 0,
) -> ScoreRequest:
    """Scores the continuation after the prompt. Raises InvalidRequest naming each field that does not fit."""
    problems = Problems()
    prompt = _tokens_of("prompt", prompt_token_ids, limits, problems)
    continuation = _tokens_of("continuation", continuation_token_ids, limits, problems)
    order = problems.of(lambda: check_priority(priority), 0)
    wanted = len(prompt) + len(continuation)
    if wanted > limits.max_sequence_length:
        problems.say(
            "continuation",
            f"got a prompt of {len(prompt)} tokens and a continuation of {len(continuation)} ({wanted} together), "
            f"wanted at most {limits.max_sequence_length} together",
        )
    problems.raise_any()
    return ScoreRequest(RequestId(request_id), prompt + continuation, len(prompt), order)


def _tokens_of(name: str, token_ids: object, limits: ModelLimits, problems: Problems) -> tuple[int, ...]:
    """The prompt or the continuation as ids in range; what is wrong with it goes to `problems`."""
    if isinstance(token_ids, str | bytes) or not isinstance(token_ids, Sequence):
        problems.add(f"{name}_token_ids", token_ids, "a list of token ids")
        return ()
    most = limits.max_sequence_length
    if not token_ids:
        problems.say(name, f"got an empty {name}, wanted at least one token")
    elif len(token_ids) > most:
        problems.say(name, f"got a {name} of {len(token_ids)} tokens, wanted at most {most}")
    else:
        return _check_ids(f"{name}_token_ids", token_ids, limits.vocab_size, problems)
    return ()


def _check_mode(mode: object, values: Mapping[str, object], limits: ModelLimits, problems: Problems) -> None:
    if mode not in limits.modes:
        can = ", ".join(limits.modes)
        problems.add("mode", str(mode), f"a mode this checkpoint can serve ({can})")
    if mode is Mode.DIFFUSION:
        for name, off in _OFF_IN_DIFFUSION.items():
            if values.get(name, off) != off:
                problems.say(name, f"got {show(values[name])}, but {name} is not supported in diffusion mode")
    else:
        for name in _ONLY_DIFFUSION:
            if name in values:
                problems.say(name, f"got {show(values[name])}, but {name} has no meaning in {mode} mode")


def _check_ids(name: str, token_ids: object, vocab_size: int, problems: Problems) -> tuple[int, ...]:
    """The ids of a list that is no longer than it may be; the first that is none goes to `problems`."""
    assert isinstance(token_ids, Sequence)
    ids = tuple(token_ids)
    if set(map(type, ids)) <= {int} and 0 <= min(ids, default=0) <= max(ids, default=0) < vocab_size:
        return ids
    for place, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocab_size:
            problems.add(f"{name}[{place}]", token, f"a token id from 0 to {vocab_size - 1}")
            break
    return ()


def show_name(name: str) -> str:
    """The name of a field as its author wrote it, on one line of bounded length."""
    return name if name.isidentifier() and len(name) <= _SHOWN else show(name)


def one_line(text: str, longest: int = 300) -> str:
    """`text` on one line of bounded length, without what a terminal would obey."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * longest]).split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


def show(value: object) -> str:
    """A value on one line of bounded length, whatever it is; no more of it is looked at than is shown."""
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > _SHOWN:
            return text[: _SHOWN - 3] + "..."
    return text


def _pieces(value: object) -> Iterator[str]:
    """`repr` bit by bit, of what JSON knows."""
    if type(value) in (list, tuple) and value:
        yield from _within("[]" if isinstance(value, list) else "()", map(_pieces, value))  # type: ignore[call-overload]
    elif isinstance(value, dict) and value:
        yield from _within("{}", (chain(_pieces(key), [": "], _pieces(inner)) for key, inner in value.items()))
    elif isinstance(value, str | bytes):
        yield repr(value[: _SHOWN + 1])
    else:
        yield _plain(value)


def _within(brackets: str, items: Iterable[Iterator[str]]) -> Iterator[str]:
    yield brackets[0]
    for place, item in enumerate(items):
        yield ", " if place else ""
        yield from item
    yield brackets[1]


def _plain(value: object) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):
        # Python writes no integer of more than a few thousand digits, and no nesting deeper than its stack.
        return f"a very large {type(value).__name__}"


def _mode(name: str, value: object, out: dict[str, object], problems: Problems) -> None:
    if isinstance(value, str) and value in tuple(Mode):
        out[name] = Mode(value)
    else:
        problems.add(name, value, f"one of {', '.join(Mode)}")


def _integer(low: int, high: int | None = None) -> _Parser:
    top = math.inf if high is None else high
    wanted = f"an integer at least {low}" if high is None else f"an integer from {low} to {high}"

    def parse(name: str, value: object, out: dict[str, object], problems: Problems) -> None:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= top:
            out[name] = value
        else:
            problems.add(name, value, wanted)

    return parse


def _number(low: float, high: float, low_open: bool = False) -> _Parser:
    wanted = f"a number in {'(' if low_open else '['}{low:g}, {high:g}]"

    def parse(name: str, value: object, out: dict[str, object], problems: Problems) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and low <= value <= high and not (low_open and value == low):  # type: ignore[operator]
            out[name] = float(value)  # type: ignore[arg-type]
        else:
            problems.add(name, value, wanted)

    return parse


def _flag(name: str, value: object, out: dict[str, object], problems: Problems) -> None:
    if isinstance(value, bool):
        out[name] = value
    else:
        problems.add(name, value, "true or false")


def _stop_token_ids(name: str, value: object, out: dict[str, object], problems: Problems) -> None:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        problems.add(name, value, "a list of token ids")
    elif len(value) > MAX_STOP_TOKEN_IDS:
        problems.say(name, f"got {len(value)} token ids, wanted at most {MAX_STOP_TOKEN_IDS}")
    else:
        out[name] = tuple(value)


_PARSERS: dict[str, _Parser] = {
    "mode": _mode,
    "max_new_tokens": _integer(1, MAX_COUNT),
    "block_size": _integer(1, MAX_BLOCK),
    "steps_per_block": _integer(1, MAX_BLOCK),
    "confidence_threshold": _number(0, 1),
    "temperature": _number(0, MAX_TEMPERATURE),
    "top_k": _integer(0, MAX_COUNT),
    "top_p": _number(0, 1, low_open=True),
    "seed": _integer(0, MAX_SEED),
    "stop_token_ids": _stop_token_ids,
    "ignore_eos": _flag,
}
