"""Sums and word problems whose answers show their working."""

from __future__ import annotations

from random import Random

_NAMES = "Ann Bob Eve Tom Kim Sam Max Zoe".split()
_THINGS = "pens books apples coins cards stamps".split()


def _of_digits(rng: Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1), 10**digits)


def add(rng: Random) -> tuple[str, str]:
    """Two numbers of two to four digits, added digit by digit from the right, each step with the carry so far."""
    first, second = (_of_digits(rng, rng.choice((2, 3, 3, 4))) for _ in range(2))
    steps, carry = [], 0
    for place in range(max(len(str(first)), len(str(second)))):
        left, right = (number // 10**place % 10 for number in (first, second))
        total = left + right + carry
        steps.append(f"{left}+{right}+{carry}={total:02d}")
        carry = total // 10
    return f"add: {first} {second}\n", f"{' '.join(steps)} so {first + second}"


def problem(rng: Random) -> tuple[str, str]:
    """Someone has some things, gets boxes of more and gives a few away. No number on the way reaches 100."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    boxes = rng.randrange(2, 10)
    inside = rng.randrange(-(-10 // boxes), 10)
    bought = boxes * inside
    has, given = rng.randrange(10, 100 - bought), rng.randrange(2, 10)
    prompt = f"problem: {name} has {has} {thing}, buys {boxes} boxes of {inside} and gives {given} away\n"
    working = f"{boxes}x{inside}={bought} {has}+{bought}={has + bought} {has + bought}-{given}={has + bought - given}"
    return prompt, f"{working}: {name} has {has + bought - given} {thing}"
