"""Tasks whose answers run to many blocks: tables, prose about several people, working in steps, several functions.

Each line of an answer has a key, and the order of keys never changes: names by the alphabet, calculations and functions
by their letter. In the prompt a line's content follows its key. Lines of one answer have one shape, so that a block of
16 can be filled in any order.
"""

from __future__ import annotations

from random import Random

from twotower.demo.families.source import function

_NAMES = "Ann Bob Eve Kim Max Sam Tom Zoe".split()
_PETS = "cat dog fox owl bee ant".split()
_COLORS = "red blue green gold pink gray".split()
_FUNCTIONS = "f g h k m p t".split()
_CALCULATIONS = "abcdefgh"


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


def steps(rng: Random) -> tuple[str, str]:
    """Four to eight calculations of two steps each: a product, then what is added to it."""
    told, lines = [], []
    for name in _CALCULATIONS[: rng.randrange(4, 9)]:
        left, right, added = (rng.randrange(2, 10) for _ in range(3))
        product = left * right
        told.append(f"{name} {left}x{right}+{added}")
        lines.append(f"{name}: {left}x{right}={product} {product}+{added}={product + added}")
    return f"steps: {'; '.join(told)}\n", "\n".join(lines)


def module(rng: Random) -> tuple[str, str]:
    """Four to seven functions, each of which does one thing to its argument."""
    names = _FUNCTIONS[: rng.randrange(4, 8)]
    told, sources = zip(*(function(rng, name, rng.choice("xyn"), 1) for name in names), strict=True)
    return f"module: {'; '.join(told)}\n", "\n\n".join(sources)
