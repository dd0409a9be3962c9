"""How a parameter of a request or a setting of an engine is declared: which values it takes, its default, its meaning.

`twotower.core` declares the parameters, `twotower.engine.settings` the settings, each once. Validation, flags, JSON,
protobuf, a service's configuration and docs derive from the declarations. This module knows none of these, and no
parameter by name.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

from twotower.errors import InvalidRequest
from twotower.showing import show

_KEY = "declared"
_AN_ID = re.compile("0|[1-9][0-9]{0,9}")
_POWER = 20  # numbers are written as a power of 2 from here on
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class Kind(Protocol):
    """Which values a parameter takes."""

    def read(self, name: str, value: object) -> Any:
        """Check and convert a request's value. Types are strict: no "5" for 5, no true for 1, no whole float for an
        integer. Raises InvalidRequest about the field `name`.
        """

    @property
    def allowed(self) -> str:
        """The values in words, for docs and help."""

    @property
    def schema(self) -> dict[str, object]:
        """The values as JSON Schema."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting's default, its values, and its meaning in one sentence."""

    default: object
    kind: Kind
    meaning: str

    @property
    def field(self) -> Any:
        """A field of a dataclass; `settings_in` and `declared_in` find it."""
        return field(default=self.default, metadata={_KEY: self})


@dataclass(frozen=True, slots=True)
class Parameter(Setting):
    """A parameter of a request.

    `modes`: the modes in which it has a meaning; empty: all. `off`: the value without an effect, which every mode
    takes. `http`: its name in the body of an HTTP request, if different; a dot is a field of a field. `by_service`:
    whether a service may set its default. `drawn`: whether a request without a value gets a drawn one. `default_is`:
    the default in words, if its value does not say it.
    """

    modes: tuple[str, ...] = ()
    off: object = None
    http: str = ""
    by_service: bool = False
    drawn: bool = False
    default_is: str = ""

    @property
    def default_told(self) -> str:
        """The default in words."""
        if self.default_is:
            return self.default_is
        told = _told(self.default)
        return f"{told} (off)" if self.off is not None and self.default == self.off else told


def settings_in(fields: Sequence[Field[Any]]) -> dict[str, Setting]:
    """The settings that fields of a dataclass declare, by name."""
    return {field.name: field.metadata[_KEY] for field in fields if _KEY in field.metadata}


def declared_in(fields: Sequence[Field[Any]]) -> dict[str, Parameter]:
    """The parameters that fields of a dataclass declare, by name, each with its name over HTTP."""
    declared = {name: setting for name, setting in settings_in(fields).items() if isinstance(setting, Parameter)}
    return {name: replace(parameter, http=parameter.http or name) for name, parameter in declared.items()}


@dataclass(frozen=True, slots=True)
class Integer:
    """An integer within a range; without an upper end if `high` is None."""

    low: int
    high: int | None = None

    def read(self, name: str, value: object) -> int:
        top = math.inf if self.high is None else self.high
        if isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= top:
            return value
        ends = f"at least {self.low}" if self.high is None else f"from {self.low} to {self.high}"
        raise _refused(name, value, f"an integer {ends}")

    @property
    def allowed(self) -> str:
        if self.high is None:
            return f"from {_told(self.low)}"
        low, high = _told(self.low), _told(self.high)
        return f"{low}–{high}" if f"{low}{high}".isdecimal() else f"{low} – {high}"

    @property
    def schema(self) -> dict[str, object]:
        return {"type": "integer", "minimum": self.low} | ({} if self.high is None else {"maximum": self.high})


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number within a range, also an integer; without an upper end if `high` is None. `low_open`: the lower
    end is excluded.
    """

    low: float
    high: float | None = None
    low_open: bool = False

    def read(self, name: str, value: object) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and self._holds(value):
            return float(value)
        raise _refused(name, value, f"a number {self._range}")

    def _holds(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < math.inf if self.high is None else value <= self.high)

    @property
    def _range(self) -> str:
        if self.high is None:
            return f"{'above' if self.low_open else 'of at least'} {self.low:g}"
        return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}]"

    @property
    def allowed(self) -> str:
        if self.high is None:
            return f"{'above' if self.low_open else 'from'} {self.low:g}"
        return f"({self.low:g}, {self.high:g}]" if self.low_open else f"{self.low:g}–{self.high:g}"

    @property
    def schema(self) -> dict[str, object]:
        low = {"exclusiveMinimum" if self.low_open else "minimum": self.low}
        return {"type": "number", **low} | ({} if self.high is None else {"maximum": self.high})


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false."""

    def read(self, name: str, value: object) -> bool:
        if isinstance(value, bool):
            return value
        raise _refused(name, value, "true or false")

    @property
    def allowed(self) -> str:
        return "true, false"

    @property
    def schema(self) -> dict[str, object]:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some words."""

    words: type[StrEnum]

    def read(self, name: str, value: object) -> StrEnum:
        if isinstance(value, str) and value in tuple(self.words):
            return self.words(value)
        raise _refused(name, value, f"one of {', '.join(self.words)}")

    @property
    def allowed(self) -> str:
        return ", ".join(f"`{word}`" for word in self.words)

    @property
    def schema(self) -> dict[str, object]:
        return {"type": "string", "enum": [str(word) for word in self.words]}


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A list of at most `most` token ids. The declaration does not know a model's vocabulary."""

    most: int

    def read(self, name: str, value: object) -> tuple[object, ...]:
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise _refused(name, value, "a list of token ids")
        if len(value) > self.most:
            raise InvalidRequest.of(name, f"got {len(value)} token ids, wanted at most {self.most}")
        return tuple(value)

    @property
    def allowed(self) -> str:
        return f"up to {self.most} token ids"

    @property
    def schema(self) -> dict[str, object]:
        return {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": self.most}


@dataclass(frozen=True, slots=True)
class TokenBiases:
    """A number for each of at most `most` token ids; in JSON the ids are text. A request holds pairs in the order of
    their ids. The declaration does not know a model's vocabulary.
    """

    most: int
    largest: float

    def read(self, name: str, value: object) -> tuple[tuple[int, float], ...]:
        if value == () and isinstance(value, tuple):
            return ()
        if not isinstance(value, Mapping):
            raise _refused(name, value, f"an object of token ids and numbers in {self._range}")
        if len(value) > self.most:
            raise InvalidRequest.of(name, f"got {len(value)} token ids, wanted at most {self.most}")
        return tuple(sorted((self._id(name, token), self._bias(name, token, bias)) for token, bias in value.items()))

    def _id(self, name: str, token: object) -> int:
        if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
            return token
        if isinstance(token, str) and _AN_ID.fullmatch(token):
            return int(token)
        raise _refused(name, token, "a token id as a name")

    def _bias(self, name: str, token: object, bias: object) -> float:
        if isinstance(bias, int | float) and not isinstance(bias, bool) and abs(bias) <= self.largest:
            return float(bias)
        raise InvalidRequest.of(name, f"got {show(bias)} for token {token}, wanted a number in {self._range}")

    @property
    def _range(self) -> str:
        return f"[{-self.largest:g}, {self.largest:g}]"

    @property
    def allowed(self) -> str:
        return f"up to {self.most} token ids, each with a number in {self._range}"

    @property
    def schema(self) -> dict[str, object]:
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^({_AN_ID.pattern})$"},
            "additionalProperties": {"type": "number", "minimum": -self.largest, "maximum": self.largest},
            "maxProperties": self.most,
        }


@dataclass(frozen=True, slots=True)
class Texts:
    """A string or a list of up to `most`, each of at least one character and of at most `characters`."""

    most: int
    characters: int

    def read(self, name: str, value: object) -> tuple[str, ...]:
        strings = [value] if isinstance(value, str) else value
        if isinstance(strings, str | bytes) or not isinstance(strings, Sequence):
            raise _no_texts(name, value)
        if len(strings) > self.most:
            raise InvalidRequest.of(name, f"got {len(strings)} strings, wanted at most {self.most}")
        for text in strings:
            if isinstance(text, str) and text:
                check_length(name, text, self.characters)
        if not all(isinstance(text, str) and text for text in strings):
            raise _no_texts(name, value if isinstance(value, str) else list(strings))
        return tuple(strings)

    @property
    def allowed(self) -> str:
        return f"up to {self.most} strings of 1–{self.characters} characters"

    @property
    def schema(self) -> dict[str, object]:
        text: Mapping[str, object] = {"type": "string", "minLength": 1, "maxLength": self.characters}
        return {"anyOf": [text, {"type": "array", "items": text, "maxItems": self.most}]}


def check_length(name: str, text: object, most: int) -> str:
    """Check a string of at most `most` whole Unicode characters. Raises InvalidRequest."""
    if isinstance(text, str) and len(text) > most:
        raise InvalidRequest.of(name, f"got a string of {len(text)} characters, wanted at most {most}")
    return check_text(name, text)


def check_text(name: str, text: object) -> str:
    """Returns `text` unchanged if it is a string of whole Unicode characters. Raises InvalidRequest."""
    if not isinstance(text, str):
        raise _refused(name, text, "a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest.of(
            name, "got text with half a surrogate pair or broken UTF-8 in it, wanted whole Unicode characters"
        ) from None
    return text


def _refused(name: str, got: object, wanted: str) -> InvalidRequest:
    return InvalidRequest.of(name, f"got {show(got)}, wanted {wanted}")


def _no_texts(name: str, got: object) -> InvalidRequest:
    return _refused(name, got, "a string or a list of strings, none of them empty")


def _told(value: object) -> str:
    """A value in the words of docs."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() if value < 0:
            return f"−{_told(-value)}"
        case int() if value.bit_length() > _POWER and value & (value - 1) == 0:
            return f"2{str(value.bit_length() - 1).translate(_RAISED)}"
        case int() if value.bit_length() > _POWER and value & (value + 1) == 0:
            return f"{_told(value + 1)}−1"
        case float():
            return f"{value:g}"
        case ():
            return "none"
    return str(value)
