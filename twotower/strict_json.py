"""Reads JSON strictly: input that a lenient parser would guess is refused, in one line."""

import re
from collections.abc import Iterator
from pathlib import Path

from twotower.errors import InvalidRequest
from twotower.json_reader import PieceReader
from twotower.showing import show

MAX_NAMES = 512  # of one object
PARSED_S = 1e-7  # a byte, about
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(body: bytes | bytearray, name: str = "body") -> dict[str, object]:
    """A JSON object, read strictly: UTF-8, no repeated names, no NaN or Infinity, no half surrogates. An object has at
    most 512 names; the text has at most 4096 values beside the numbers in arrays. In its own thread it lets other
    threads run, however long the body is.

    Raises InvalidRequest about the field `name`.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest.of(name, f"got bytes that are not UTF-8 at position {error.start}") from None
    try:
        value = PieceReader(text, _no_repeats, _no_constant).read()
    except RecursionError:
        raise InvalidRequest.of(name, "got JSON that is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest.of(name, f"got broken JSON: {error}") from None
    if _SURROGATE.search(text) and any(map(_is_broken, _strings(value))):
        raise InvalidRequest.of(name, "got half a surrogate pair (a lone \\ud800 to \\udfff)")
    if not isinstance(value, dict):
        raise InvalidRequest.of(name, f"got {kind_of(value)}, wanted a JSON object")
    return value


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a JSON lines file with their numbers from 1, without blank ones. Raises InvalidRequest."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.removeprefix(_BYTE_ORDER_MARK)
    except OSError as error:
        raise InvalidRequest.of("--input", f"{path}: {error.strerror or error}") from None


def parse_line(line: bytes) -> dict[str, object]:
    """The object of one line, read strictly; null counts as not given. Raises InvalidRequest."""
    return {name: value for name, value in parse_json(line, "line").items() if value is not None}


def kind_of(value: object) -> str:
    """A JSON value's type in JSON's words."""
    names = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    return names.get(type(value), "null")


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(pairs) > MAX_NAMES:
        raise ValueError(f"an object of {len(pairs)} names, wanted at most {MAX_NAMES}")
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{show(name)} is there twice")
        found[name] = value
    return found


def _strings(value: object) -> Iterator[str]:
    """All strings of a JSON value, names too."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")
