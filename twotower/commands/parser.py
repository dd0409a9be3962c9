"""How all our commands read their flags: errors of one line, no abbreviations, values as JSON would have them."""

import argparse
import json
from typing import Any, NoReturn

_VERBOSE = "show the traceback of an error that nobody expected"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes no abbreviated flags. Its subparsers are of this
    class, too. Each takes `--verbose`; `verbose_too` says what else the flag shows."""

    def __init__(self, *arguments: Any, verbose_too: str = "", **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        # A subparser's default would replace what was given before the command's name.
        self.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=_VERBOSE + verbose_too)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, and without the flag `verbose` is False."""
        return super().parse_args(args, namespace or argparse.Namespace(verbose=False))

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            # argparse takes what begins with a dash for a flag.
            message += " (a value that begins with - is written --flag=VALUE)"
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def number(text: str) -> object:
    """The number a flag spells, or its text, so that validation says the same of it as of a JSON value."""
    for kind in (int, float):
        try:
            # Python alone knows 1_0.
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
    """Token ids with commas between them; what is no number stays text, for validation to refuse by its place."""
    return [number(part) for part in text.split(",")] if text.strip() else []


def biases(text: str) -> dict[str, object]:
    """Token ids and numbers, as `ids` has a list: what is none stays text."""
    pairs = (part.partition(":") for part in text.split(",")) if text.strip() else ()
    return {token.strip(): number(bias) for token, _, bias in pairs}


def json_value(text: str) -> object:
    """What JSON text says; what is no JSON stays text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
