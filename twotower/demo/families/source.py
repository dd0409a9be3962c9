"""A few lines of Python from a specification in words."""

from __future__ import annotations

from random import Random

_NAMES = "f g h run step".split()
_VARIABLES = "x y n k".split()
_STEPS = {"add": "+", "subtract": "-", "multiply by": "*"}


def code(rng: Random) -> tuple[str, str]:
    """A function that does one to three things to its argument, one a line."""
    name, variable = rng.choice(_NAMES), rng.choice(_VARIABLES)
    told, lines = [], []
    for _ in range(rng.choice((1, 2, 2, 3))):
        words, number = rng.choice(list(_STEPS)), rng.randrange(2, 10)
        told.append(f"{words} {number}")
        lines.append(f"    {variable} = {variable} {_STEPS[words]} {number}\n")
    prompt = f"code: {name} of {variable}, {' then '.join(told)}\n"
    return prompt, f"def {name}({variable}):\n{''.join(lines)}    return {variable}"
