"""A few lines of Python from a specification in words."""

from __future__ import annotations

from random import Random

_NAMES = "f g h run step".split()
_VARIABLES = "x y n k".split()
_STEPS = {"add": "+", "subtract": "-", "multiply by": "*"}


def function(rng: Random, name: str, variable: str, steps: int) -> tuple[str, str]:
    """A function in words and in Python: so many things done to its argument, one a line."""
    told, lines = [], []
    for _ in range(steps):
        words, number = rng.choice(list(_STEPS)), rng.randrange(2, 10)
        told.append(f"{words} {number}")
        lines.append(f"    {variable} = {variable} {_STEPS[words]} {number}\n")
    specification = f"{name} of {variable}, {' then '.join(told)}"
    return specification, f"def {name}({variable}):\n{''.join(lines)}    return {variable}"


def code(rng: Random) -> tuple[str, str]:
    """A function of one to three steps."""
    name, variable = rng.choice(_NAMES), rng.choice(_VARIABLES)
    specification, source = function(rng, name, variable, rng.choice((1, 2, 2, 3)))
    return f"code: {specification}\n", source
