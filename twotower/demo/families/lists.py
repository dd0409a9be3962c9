"""Lists put in another order, counted and closed."""

from __future__ import annotations

from random import Random

_WORDS = "red blue green gold pink gray cat dog fox owl bee ant sun moon rain snow".split()
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def reverse(rng: Random) -> tuple[str, str]:
    """A list of words, last first."""
    chosen = rng.choices(_WORDS, k=rng.choice((3, 4, 5, 6)))
    return f"reverse: {' '.join(chosen)}\n", " ".join(reversed(chosen))


def sort(rng: Random) -> tuple[str, str]:
    """Three to six numbers below 100, smallest first."""
    numbers = rng.sample(range(10, 100), rng.choice((3, 4, 5, 6)))
    return f"sort: {' '.join(map(str, numbers))}\n", " ".join(map(str, sorted(numbers)))


def count(rng: Random) -> tuple[str, str]:
    """How often the first word occurs in the list after it; the answer counts along."""
    wanted, *others = rng.sample(_WORDS, 4)
    listed = [wanted if rng.random() < 0.45 else rng.choice(others) for _ in range(rng.choice((3, 4, 5, 6, 7)))]
    found, steps = 0, []
    for word in listed:
        found += word == wanted
        steps.append(f"{word} {found}" if word == wanted else word)
    return f"count {wanted}: {' '.join(listed)}\n", f"{', '.join(steps)}: {found}"


def brackets(rng: Random) -> tuple[str, str]:
    """The brackets that close a text of open ones, innermost first; some are closed already."""
    opened: list[str] = []
    text = ""
    length = rng.randrange(3, 10)
    while len(text) < length or not opened:
        if opened and rng.random() < 0.3:
            text += _CLOSING[opened.pop()]
        else:
            opened.append(rng.choice("([{"))
            text += opened[-1]
    return f"close: {' '.join(text)}\n", " ".join(_CLOSING[bracket] for bracket in reversed(opened))
