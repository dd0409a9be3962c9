"""How all our commands read their flags: errors of one line, no abbreviations, values as in JSON."""

import argparse
import json
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes no abbreviated flags. Its subparsers are of the
    same class.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            # argparse takes a value that begins with a dash for a flag.
            message += " (a value that begins with - is written --flag=VALUE)"
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def number(text: str) -> object:
    """The number in a flag's text, or the text itself: validation then gives the same error as for a JSON value."""
    for kind in (int, float):
        try:
            # Only Python reads 1_0 as a number.
            return text if "_" in text else kind(text)
        except ValueError:
            continue
    return text


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number from 1")
    return int(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = number(text)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number from 0 to 1")
    return value


def ids(text: str) -> list[object]:
    """Token ids separated by commas; an entry that is no number stays text, and validation refuses it by its place."""
    return [number(part) for part in text.split(",")] if text.strip() else []


def biases(text: str) -> dict[str, object]:
    """Pairs of token id and number; as in `ids`, other entries stay text."""
    pairs = (part.partition(":") for part in text.split(",")) if text.strip() else ()
    return {token.strip(): number(bias) for token, _, bias in pairs}


def json_value(text: str) -> object:
    """The value of a JSON text; other text stays text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
