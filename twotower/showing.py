"""How a message shows foreign values, names and texts: each on one line of bounded length."""

from collections.abc import Iterable, Iterator
from itertools import chain

_SHOWN = 60  # characters of a value or a name


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
