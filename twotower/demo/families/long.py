"""Tasks whose answers run to many blocks: tables, prose about several people, a running balance, several functions.

Each line of an answer has a key, and the keys come in an order that never changes: names by the alphabet, days and
functions by their letter. What a line says stands right behind its key in the prompt. Lines of one answer have one
shape, so that a block of 16 can be filled in any order.
"""

from __future__ import annotations

from random import Random

from twotower.demo.families.source import function

_NAMES = "Ann Bob Eve Kim Max Sam Tom Zoe".split()
_PETS = "cat dog fox owl bee ant".split()
_COLORS = "red blue green gold pink gray".split()
_FUNCTIONS = "f g h k m p t".split()
_DAYS = "abcdefghijkl"


def _names(rng: Random) -> list[str]:
    return _NAMES[: rng.randrange(5, 9)]


def rows(rng: Random) -> tuple[str, str]:
    """A CSV head and five to eight rows to lines of JSON or of key=value pairs."""
    column, values = rng.choice((("pet", _PETS), ("color", _COLORS)))
    table = [(name, rng.randrange(10, 100), rng.choice(values)) for name in _names(rng)]
    given = ";".join(f"{name},{age},{value}" for name, age, value in table)
    if rng.random() < 0.6:
        lines = [f'{{"name": "{name}", "age": {age}, "{column}": "{value}"}}' for name, age, value in table]
        return f"rows json: name,age,{column};{given}\n", "\n".join(lines)
    lines = [f"name={name} age={age} {column}={value}" for name, age, value in table]
    return f"rows pairs: name,age,{column};{given}\n", "\n".join(lines)


def people(rng: Random) -> tuple[str, str]:
    """A sentence about each of five to eight people, from two facts."""
    table = [(name, rng.randrange(10, 100), rng.choice(_PETS)) for name in _names(rng)]
    given = "; ".join(f"{name} {age} {pet}" for name, age, pet in table)
    return f"people: {given}\n", " ".join(f"{name} is {age} years old and has a pet {pet}." for name, age, pet in table)


def balance(rng: Random) -> tuple[str, str]:
    """A balance of two digits over six to twelve days, each of which adds or subtracts a digit."""
    start = now = rng.randrange(20, 90)
    told, lines = [], []
    for day in _DAYS[: rng.randrange(6, 13)]:
        change = rng.randrange(1, 10)
        added = now < 19 or (now <= 90 and rng.random() < 0.5)
        after = now + change if added else now - change
        told.append(f"{day} {'+' if added else '-'}{change}")
        lines.append(f"{day}: {now}{'+' if added else '-'}{change}={after}")
        now = after
    return f"balance: {start}; {'; '.join(told)}\n", "\n".join(lines)


def module(rng: Random) -> tuple[str, str]:
    """Four to seven functions, each of which does one thing to its argument."""
    names = _FUNCTIONS[: rng.randrange(4, 8)]
    told, sources = zip(*(function(rng, name, rng.choice("xyn"), 1) for name in names), strict=True)
    return f"module: {'; '.join(told)}\n", "\n\n".join(sources)
