"""The control messages of a link and their bytes: JSON, strict in both directions, nothing pickled.

A frame is `[number, [[kind, fields], ...]]`; frames of a connection are numbered from 0, so that a lost, repeated
or reordered one is seen. Knows nothing of connections or tensors.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from twotower import errors
from twotower.errors import FieldError, InvalidRequest, TwoTowerError
from twotower.exchange.protocol import Attach, Commit, Delta, Failed, Prefill, Release, Released


class CodecError(TwoTowerError):
    """Bytes that are none of our messages."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The denoiser side introduces itself. `layout` describes a delta's tensors, `device` where its mirror lives."""

    version: int
    link: int
    epoch: int
    layout: str
    device: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """The context side agrees; both now build a data group of this backend."""

    backend: str


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """`progress` grows while the sender's engine lives."""

    progress: int


@dataclass(frozen=True, slots=True)
class Payload:
    """`nbytes` follow in the data group: these deltas' tensors, one after the other."""

    number: int
    nbytes: int
    deltas: tuple[Delta, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """A payload has been written into the mirror: there is a free staging buffer again."""


Message = (
    Hello | Welcome | Refused | Heartbeat | Payload | Taken | Prefill | Commit | Attach | Release | Failed | Released
)

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Message)}
_ERRORS: dict[str, type[TwoTowerError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, TwoTowerError)
}


def encode(number: int, messages: Sequence[Message]) -> bytes:
    """One frame."""
    body = [[type(message).__name__, _plain(message)] for message in messages]
    return json.dumps([number, body], separators=(",", ":"), allow_nan=False).encode()


def decode(frame: bytes) -> tuple[int, list[Message]]:
    """A frame's number and messages. Raises CodecError."""
    try:
        envelope = json.loads(frame)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"got {len(frame)} bytes that are not JSON, wanted a frame") from error
    match envelope:
        case [int(number), [*body]] if number is not True and number is not False:
            return number, [_message(item) for item in body]
    raise CodecError(f"got {frame[:80]!r}, wanted [number, [[kind, fields], ...]]")


def _message(item: object) -> Message:
    match item:
        case [str(kind), dict(values)] if kind in _KINDS:
            message: Message = _build(_KINDS[kind], values)
            return message
    raise CodecError(f"got {str(item)[:80]!r}, wanted one of {sorted(_KINDS)} with its fields")


def _plain(value: Any) -> Any:
    """A dataclass's fields as JSON values."""
    return {field.name: _plain_field(getattr(value, field.name)) for field in fields(value)}


def _plain_field(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) if isinstance(item, Delta) else item for item in value]
    return _plain_error(value) if isinstance(value, TwoTowerError) else value


def _plain_error(error: TwoTowerError) -> dict[str, Any]:
    """Errors outside the public tree travel as their nearest ancestor in it."""
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS)
    if isinstance(error, InvalidRequest):
        return {"type": name, "problems": [[p.field, p.message] for p in error.problems]}
    return {"type": name, "message": str(error)}


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    hints = _HINTS[kind]
    if values.keys() != hints.keys():
        raise CodecError(f"{kind.__name__}: got fields {sorted(values)}, wanted {sorted(hints)}")
    return kind(**{name: _checked(kind, name, hints[name], value) for name, value in values.items()})


def _checked(kind: type[Any], name: str, hint: Any, value: Any) -> Any:
    try:
        return _READERS[hint](value)
    except (TypeError, KeyError, ValueError) as error:
        raise CodecError(f"{kind.__name__}.{name}: got {str(value)[:80]!r}, wanted {hint}") from error


def _exactly(kind: type[Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError
        return value

    return read


def _ints(value: Any) -> tuple[int, ...]:
    if type(value) is not list or any(type(item) is not int for item in value):
        raise TypeError
    return tuple(value)


def _deltas(value: Any) -> tuple[Delta, ...]:
    return tuple(_build(Delta, _exactly(dict)(item)) for item in _exactly(list)(value))


def _error(value: Any) -> TwoTowerError:
    kind = _ERRORS[value["type"]]
    if issubclass(kind, InvalidRequest):
        return kind([FieldError(field, message) for field, message in value["problems"]])
    return kind(_exactly(str)(value["message"]))


_READERS: dict[Any, Callable[[Any], Any]] = {
    int: _exactly(int),
    bool: _exactly(bool),
    str: _exactly(str),
    tuple[int, ...]: _ints,
    tuple[Delta, ...]: _deltas,
    TwoTowerError: _error,
}
_HINTS: dict[type[Any], dict[str, Any]] = {kind: get_type_hints(kind) for kind in (*_KINDS.values(), Delta)}
