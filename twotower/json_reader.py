"""Reads JSON piece by piece, so that a thread with a long text lets other threads run.

`json` holds Python's lock from the first to the last byte. Here it reads single values, and numbers of an array some
thousands at a time. Python code walks the arrays and objects, and there another thread can take the lock.
"""

import json
import re
from collections.abc import Callable

MAX_VALUES = 4096  # beside the numbers in arrays: more than any request needs, and quickly freed
_RUN = 8192  # characters of numbers that are read in one go
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBERS = re.compile(r"[-+.eE0-9, \t\n\r]*")


class PieceReader:
    """Reads one JSON text. `pairs`: makes an object from its names and values."""

    def __init__(
        self, text: str, pairs: Callable[[list[tuple[str, object]]], object], constant: Callable[[str], object]
    ) -> None:
        self._text, self._pairs = text, pairs
        self._scan = json.JSONDecoder(parse_constant=constant).raw_decode
        self._values = 0

    def read(self) -> object:
        """The value of the text. Raises ValueError if the text is broken or has too many values, and RecursionError."""
        value, end = self._value(self._skip(0))
        if end != len(self._text):
            raise self._broken("Extra data", end)
        return value

    def _value(self, at: int) -> tuple[object, int]:
        """The value that begins here, and where the next token does."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values beside the numbers in arrays")
        match self._text[at : at + 1]:
            case "[":
                return self._array(at + 1)
            case "{":
                return self._object(at + 1)
        value, end = self._scan(self._text, at)
        return value, self._skip(end)

    def _array(self, at: int) -> tuple[list[object], int]:
        values: list[object] = []
        at = self._skip(at)
        if self._text.startswith("]", at):
            return values, self._skip(at + 1)
        while True:
            at = self._numbers(at, values)
            value, at = self._value(at)
            values.append(value)
            if self._text.startswith("]", at):
                return values, self._skip(at + 1)
            at = self._past(",", at)

    def _numbers(self, at: int, values: list[object]) -> int:
        """Takes all but the last of the numbers that follow each other from here on."""
        while True:
            match = _NUMBERS.match(self._text, at, at + _RUN)
            assert match is not None
            end = self._text.rfind(",", at, match.end())
            if end <= at:
                return at
            try:
                values += json.loads(f"[{self._text[at:end]}]")
            except json.JSONDecodeError as error:
                raise self._broken(error.msg, at + error.pos - 1) from None
            at = self._skip(end + 1)

    def _object(self, at: int) -> tuple[object, int]:
        pairs: list[tuple[str, object]] = []
        at = self._skip(at)
        if self._text.startswith("}", at):
            return self._pairs(pairs), self._skip(at + 1)
        while True:
            if not self._text.startswith('"', at):
                raise self._broken("Expecting property name enclosed in double quotes", at)
            name, at = self._scan(self._text, at)
            value, at = self._value(self._past(":", self._skip(at)))
            pairs.append((name, value))
            if self._text.startswith("}", at):
                return self._pairs(pairs), self._skip(at + 1)
            at = self._past(",", at)

    def _past(self, mark: str, at: int) -> int:
        if not self._text.startswith(mark, at):
            raise self._broken(f"Expecting {mark!r} delimiter", at)
        return self._skip(at + 1)

    def _skip(self, at: int) -> int:
        match = _SPACE.match(self._text, at)
        assert match is not None
        return match.end()

    def _broken(self, message: str, at: int) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._text, at)
