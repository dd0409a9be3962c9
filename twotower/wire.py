"""Messages between our own processes as JSON: dataclasses by the name of their kind, strict when read, never pickled.

Knows nothing of connections, nor what a message means.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from twotower import errors
from twotower.errors import FieldError, InvalidRequest, TwoTowerError

Message = TypeVar("Message")
_Read = Callable[[Any], Any]

_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)  # `json.dumps` would make one each time
_ERRORS: dict[str, type[TwoTowerError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, TwoTowerError)
}


class CodecError(TwoTowerError):
    """Bytes that are none of our messages."""


class Codec(Generic[Message]):
    """Reads and writes dataclasses of the given kinds as `[kind, fields]`.

    Fields may be int, float, bool, str, enums of strings, errors, dataclasses, tuples of one of these, and None.
    """

    def __init__(self, *kinds: type[Any]) -> None:
        self._readers = {kind.__name__: _dataclass_reader(kind) for kind in kinds}

    def plain(self, message: Message) -> list[Any]:
        """A JSON value."""
        return [type(message).__name__, _plain(message)]

    def message(self, plain: object) -> Message:
        """The message of a JSON value. Raises CodecError."""
        match plain:
            case [str(kind), dict(values)] if kind in self._readers:
                message: Message = self._readers[kind](values)
                return message
        raise CodecError(f"got {str(plain)[:80]!r}, wanted one of {sorted(self._readers)} with its fields")

    def encode(self, messages: Sequence[Message]) -> bytes:
        """Several messages, in order."""
        return to_json([self.plain(message) for message in messages])

    def decode(self, data: bytes) -> list[Message]:
        """What `encode` was given. Raises CodecError."""
        match from_json(data):
            case [*items]:
                return [self.message(item) for item in items]
        raise CodecError(f"got {data[:80]!r}, wanted [[kind, fields], ...]")


def to_json(value: object) -> bytes:
    return _ENCODER.encode(value).encode()


def from_json(data: bytes) -> Any:
    """Raises CodecError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"got {len(data)} bytes that are not JSON, wanted a frame") from error


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return value if not value or isinstance(value[0], int | float) else [_plain(item) for item in value]
    if isinstance(value, TwoTowerError):
        return _plain_error(value)
    if is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def _plain_error(error: TwoTowerError) -> dict[str, Any]:
    """Errors outside the public tree travel as their nearest ancestor in it."""
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS)
    if isinstance(error, InvalidRequest):
        return {"type": name, "problems": [[p.field, p.message] for p in error.problems]}
    return {"type": name, "message": str(error)}


def _reader(hint: Any) -> _Read:
    """What turns a JSON value into one of this type, or raises TypeError, KeyError or ValueError."""
    if get_origin(hint) is tuple:
        return _tuple_reader(_reader(get_args(hint)[0]))
    if get_origin(hint) is UnionType:
        [inner] = (kind for kind in get_args(hint) if kind is not NoneType)
        return _optional_reader(_reader(inner))
    kind: type[Any] = getattr(hint, "__supertype__", hint)  # a NewType is what it was made from
    if issubclass(kind, Enum):
        return kind
    if issubclass(kind, TwoTowerError):
        return _error
    return _dataclass_reader(kind) if is_dataclass(kind) else partial(_exactly, kind)


def _dataclass_reader(kind: type[Any]) -> _Read:
    hints = get_type_hints(kind)
    readers = {field.name: _reader(hints[field.name]) for field in fields(kind)}

    def read(values: Any) -> Any:
        if not isinstance(values, dict) or values.keys() != readers.keys():
            got = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise CodecError(f"{kind.__name__}: got fields {got}, wanted {sorted(readers)}")
        found = {}
        for name, value in values.items():
            try:
                found[name] = readers[name](value)
            except (TypeError, KeyError, ValueError) as error:
                raise CodecError(f"{kind.__name__}.{name}: got {str(value)[:80]!r}, wanted {hints[name]}") from error
        return kind(**found)

    return read


def _tuple_reader(read: _Read) -> _Read:
    return lambda value: tuple(map(read, _exactly(list, value)))


def _optional_reader(read: _Read) -> _Read:
    return lambda value: None if value is None else read(value)


def _exactly(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise TypeError
    return value


def _error(value: Any) -> TwoTowerError:
    kind = _ERRORS[value["type"]]
    if issubclass(kind, InvalidRequest):
        return kind([FieldError(field, message) for field, message in value["problems"]])
    message: str = _exactly(str, value["message"])
    return kind(message)
