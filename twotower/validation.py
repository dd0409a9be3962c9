"""Checks a request before any tower is touched. No other module does.

Command line, HTTP and gRPC all pass a plain mapping here, so that the same mistake gets the same words.
"""

import heapq
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from twotower.constraints import Constraint
from twotower.core import (
    LOGPROBS,
    MAX_LIKELIHOODS,
    ONLY_WITH_FLOOR,
    PARAMETERS,
    PRIORITY,
    STOP,
    TRACE,
    DecodingParams,
    Floor,
    Mode,
    Request,
    RequestId,
    ScoreRequest,
)
from twotower.errors import FieldError, InvalidRequest
from twotower.parameters import Parameter, TokenBiases, TokenIds, check_text
from twotower.showing import show, show_name

_NAMED = 8  # unknown fields that are named


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The limits of a running checkpoint. `defaults` fill in what a request leaves out."""

    vocab_size: int
    max_sequence_length: int
    modes: tuple[Mode, ...] = tuple(Mode)
    defaults: DecodingParams = field(default_factory=DecodingParams)


@dataclass(frozen=True, slots=True)
class Terms:
    """The checked fields of a request beside its prompt. `length_given`: whether max_new_tokens is the
    request's own.
    """

    params: DecodingParams
    priority: int
    length_given: bool
    trace: bool = False
    logprobs: int | None = None


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
        """The result of `check`; if it raises InvalidRequest, `otherwise`, and the problems are collected."""
        try:
            return check()
        except InvalidRequest as error:
            self._found.extend(error.problems)
            return otherwise

    def raise_any(self) -> None:
        if self._found:
            raise InvalidRequest(self._found)


def draw_seed() -> int:
    """A seed for a request without one. It is recorded with the request."""
    # A double holds it, and so does every reader of JSON.
    return secrets.randbelow(2**53)


def parse_params(given: Mapping[str, object], limits: ModelLimits) -> DecodingParams:
    """Decoding parameters from a request's fields of the same names. Raises InvalidRequest with every problem.

    Only fields that were given appear in `given`; an unknown one is an error. Types are strict: no "5" for 5, no true
    for 1, no whole float for an int.
    """
    values = check_values(given)
    problems = Problems()
    mode = values.get("mode", limits.defaults.mode)
    _check_mode(mode, values, limits, problems)
    for name, parameter in PARAMETERS.items():
        if isinstance(parameter.kind, TokenIds):
            _check_ids(name, values.get(name, ()), limits.vocab_size, problems)
        elif isinstance(parameter.kind, TokenBiases):
            _check_biased(name, values.get(name, ()), limits.vocab_size, problems)
    problems.raise_any()
    drawn = {name: draw_seed() for name, parameter in PARAMETERS.items() if parameter.drawn}
    chosen = {name: values.get(name, drawn.get(name, getattr(limits.defaults, name))) for name in PARAMETERS}
    return DecodingParams(**chosen)


def check_values(given: Mapping[str, object]) -> dict[str, Any]:
    """The fields of `given` in DecodingParams' form. Each is checked alone for type and range, without model or mode.

    Raises InvalidRequest with every problem.
    """
    problems = Problems()
    check_known(given, PARAMETERS, problems)
    known = PARAMETERS.keys() & given.keys()
    values = {name: problems.of(partial(PARAMETERS[name].kind.read, name, given[name]), None) for name in sorted(known)}
    problems.raise_any()
    return values


def check_priority(priority: object) -> int:
    """Raises InvalidRequest."""
    return int(PRIORITY.kind.read("priority", priority))


def check_logprobs(logprobs: object) -> int | None:
    """None is not asked for. Raises InvalidRequest."""
    return None if logprobs is None else int(LOGPROBS.kind.read("logprobs", logprobs))


def check_token_ids(name: str, token_ids: Sequence[object], vocab_size: int) -> tuple[int, ...]:
    """Check that every id is in range. Raises InvalidRequest naming the first that is not."""
    problems = Problems()
    ids = _check_ids(name, token_ids, vocab_size, problems)
    problems.raise_any()
    return ids


def check_part(name: str, token_ids: Sequence[object], limits: ModelLimits) -> tuple[int, ...]:
    """The prompt, or the continuation, as a tuple of ids, every one in range. Raises InvalidRequest."""
    problems = Problems()
    part = _tokens_of(name, token_ids, limits, problems)
    problems.raise_any()
    return part


def parse_stop(stop: object) -> tuple[str, ...]:
    """Stop strings: one, or a list of them. Raises InvalidRequest."""
    return tuple(STOP.kind.read("stop", stop))


def check_bytes(name: str, text: object, tokens: int, bytes_per_token: int) -> str:
    """Check that a text is not too long for `tokens` tokens: it may have at most the bytes of so many of the longest
    token.

    Raises InvalidRequest. Called before the text is tokenized, which takes far longer.
    """
    known = check_text(name, text)
    size, most = len(known.encode()), tokens * bytes_per_token
    if size > most:
        raise InvalidRequest.of(
            name,
            f"got {size} bytes of text, wanted at most {most}: {tokens} tokens of no more than {bytes_per_token} bytes",
        )
    return known


def check_known(given: Iterable[str], known: Iterable[str], problems: Problems) -> None:
    """Adds a problem for each of the first few unknown fields."""
    wanted = sorted(known)
    for name in heapq.nsmallest(_NAMED, set(given) - set(wanted)):
        problems.say(show_name(name), f"unknown field, wanted one of {', '.join(wanted)}")


def make_request(
    request_id: str,
    prompt_token_ids: Sequence[object],
    given: Mapping[str, object],
    limits: ModelLimits,
    priority: object = 0,
    trace: object = TRACE.default,
    logprobs: object = LOGPROBS.default,
) -> Request:
    """A request that fits the running model. Raises InvalidRequest naming each field that does not."""
    problems = Problems()
    prompt = problems.of(lambda: check_part("prompt", prompt_token_ids, limits), tuple[int, ...]())
    terms = problems.of(lambda: check_terms(given, priority, limits, trace, logprobs), None)
    problems.raise_any()
    assert terms is not None
    return join(request_id, prompt, terms, limits)


def check_terms(
    given: Mapping[str, object],
    priority: object,
    limits: ModelLimits,
    trace: object = TRACE.default,
    logprobs: object = LOGPROBS.default,
) -> Terms:
    """Check all fields except the prompt. Raises InvalidRequest naming each wrong field."""
    problems = Problems()
    params = problems.of(lambda: parse_params(given, limits), None)
    order = problems.of(lambda: check_priority(priority), 0)
    traced = problems.of(lambda: bool(TRACE.kind.read("trace", trace)), False)
    alternatives = problems.of(lambda: check_logprobs(logprobs), None)
    if params is not None:
        _check_meaning("trace", TRACE, traced, params.mode, problems)
    problems.raise_any()
    assert params is not None
    return Terms(params, order, "max_new_tokens" in given, traced, alternatives)


def check_likelihoods(tokens: int, logprobs: int | None, most: int = MAX_LIKELIHOODS) -> None:
    """Check the number of log-probabilities: so many tokens, each with its alternatives. Raises InvalidRequest."""
    if logprobs is not None and tokens * (logprobs + 1) > most:
        told = f"got {logprobs} for up to {tokens} tokens, which is {tokens * (logprobs + 1)} log-probabilities"
        raise InvalidRequest.of("logprobs", f"{told}; wanted at most {most}, the token's own among them")


def join(request_id: str, prompt: tuple[int, ...], terms: Terms, limits: ModelLimits) -> Request:
    """The request with a checked prompt. Raises InvalidRequest if prompt and new tokens do not fit together.

    Without max_new_tokens the request gets the default, or the room that the prompt leaves if that is less.
    """
    longest, params = limits.max_sequence_length, terms.params
    if not terms.length_given:
        room = longest - len(prompt)
        if room < 1:
            wanted = f"wanted at most {longest - 1}, so that one more fits after them"
            raise InvalidRequest.of("prompt", f"got {len(prompt)} tokens, {wanted}")
        params = replace(params, max_new_tokens=min(params.max_new_tokens, room))
    together = len(prompt) + params.max_new_tokens
    if together > longest:
        raise InvalidRequest.of(
            "max_new_tokens",
            f"got {params.max_new_tokens} after a prompt of {len(prompt)} tokens ({together} together), "
            f"wanted at most {longest} together",
        )
    if params.min_tokens > params.max_new_tokens:
        wanted = f"wanted at most max_new_tokens ({params.max_new_tokens})"
        raise InvalidRequest.of("min_tokens", f"got {params.min_tokens}, {wanted}")
    check_likelihoods(params.max_new_tokens, terms.logprobs)
    return Request(
        RequestId(request_id), prompt, params, priority=terms.priority, trace=terms.trace, logprobs=terms.logprobs
    )


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
    problems.raise_any()
    return join_score(request_id, prompt, continuation, order, limits)


def join_score(
    request_id: str,
    prompt: tuple[int, ...],
    continuation: tuple[int, ...],
    priority: int,
    limits: ModelLimits,
    logprobs: int | None = None,
) -> ScoreRequest:
    """The request with two checked parts. Raises InvalidRequest if they do not fit together."""
    together = len(prompt) + len(continuation)
    if together > limits.max_sequence_length:
        raise InvalidRequest.of(
            "continuation",
            f"got a prompt of {len(prompt)} tokens and a continuation of {len(continuation)} ({together} together), "
            f"wanted at most {limits.max_sequence_length} together",
        )
    check_likelihoods(together, logprobs)
    return ScoreRequest(RequestId(request_id), prompt + continuation, len(prompt), priority, logprobs)


def _tokens_of(name: str, token_ids: object, limits: ModelLimits, problems: Problems) -> tuple[int, ...]:
    """The prompt or the continuation as ids in range; its errors go to `problems`."""
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


def _check_mode(mode: object, values: Mapping[str, Any], limits: ModelLimits, problems: Problems) -> None:
    if mode not in limits.modes:
        can = ", ".join(limits.modes)
        problems.add("mode", str(mode), f"a mode this checkpoint can serve ({can})")
    for name, parameter in PARAMETERS.items():
        if name in values:
            _check_meaning(name, parameter, values[name], mode, problems)
    if values.get("structured_outputs") is not None:
        for name in ("min_tokens", "ignore_eos"):
            if values.get(name):
                problems.say(name, f"got {show(values[name])}, but where structured_outputs ends, the answer does")
    if mode is Mode.AUTO:
        _check_floor(Floor(values.get("floor", limits.defaults.floor)), values, problems)


def _check_floor(floor: Floor, values: Mapping[str, object], problems: Problems) -> None:
    for name, wanted in ONLY_WITH_FLOOR.items():
        if name in values and wanted is not floor and values[name] != PARAMETERS[name].off:
            problems.say(name, f"got {show(values[name])}, but {name} has no meaning with floor {floor} in auto mode")


def _check_meaning(name: str, parameter: Parameter, value: object, mode: object, problems: Problems) -> None:
    if parameter.modes and mode not in parameter.modes and value != parameter.off:
        why = "has no meaning in" if parameter.off is None else "is not supported in"
        got = value.described if isinstance(value, Constraint) else value
        only = ", ".join(parameter.modes)
        problems.say(name, f"got {show(got)}, but {name} {why} {mode} mode, only in {only}")


def _check_biased(name: str, biases: Sequence[tuple[int, float]], vocab_size: int, problems: Problems) -> None:
    """Check biased token ids. They are sorted, so the last one is the largest."""
    if biases and biases[-1][0] >= vocab_size:
        problems.add(name, biases[-1][0], f"token ids from 0 to {vocab_size - 1} as names")


def _check_ids(name: str, token_ids: object, vocab_size: int, problems: Problems) -> tuple[int, ...]:
    """The ids of a list of allowed length; the first invalid id goes to `problems`."""
    assert isinstance(token_ids, Sequence)
    ids = tuple(token_ids)
    if set(map(type, ids)) <= {int} and 0 <= min(ids, default=0) <= max(ids, default=0) < vocab_size:
        return ids
    for place, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocab_size:
            problems.add(f"{name}[{place}]", token, f"a token id from 0 to {vocab_size - 1}")
            break
    return ()
