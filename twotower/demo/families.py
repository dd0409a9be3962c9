"""Task families of the demo corpus: each draws one prompt and the only right answer.

Knows nothing about tokens or the train/test split.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Family = Callable[[Random], tuple[str, str]]

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ROMAN = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"),
    (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip
_MONTHS = ("January February March April May June July August September October November December").split()
_WORDS = "red blue green gold pink gray cat dog fox owl bee ant sun moon rain snow".split()
_VALUES: dict[str, tuple[str, ...]] = {
    "name": tuple("ann bob eve tom kim sam max zoe".split()),
    "city": tuple("rome oslo paris lima cairo delhi".split()),
    "pet": tuple("cat dog fox owl bee ant".split()),
    "color": tuple("red blue green gold pink gray".split()),
}


def spell(number: int) -> str:
    """Spell 0..9999 in British English: 345 -> "three hundred and forty-five"."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        tens, unit = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_UNITS[unit]}" if unit else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{_UNITS[hundreds]} hundred" + (f" and {spell(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    joint = " and " if 0 < rest < 100 else " "
    return f"{_UNITS[thousands]} thousand" + (f"{joint}{spell(rest)}" if rest else "")


def roman(number: int) -> str:
    """Write 1..3999 in roman numerals."""
    letters = ""
    for value, symbol in _ROMAN:
        count, number = divmod(number, value)
        letters += symbol * count
    return letters


def _any_number(rng: Random) -> int:
    """A number of 1..4 digits; few of the short ones, because there are few to learn."""
    digits = rng.choices((1, 2, 3, 4), weights=(1, 4, 20, 40))[0]
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def words(rng: Random) -> tuple[str, str]:
    """Digits to words."""
    number = _any_number(rng)
    return f"words: {number}\n", spell(number)


def number(rng: Random) -> tuple[str, str]:
    """Words to digits."""
    value = _any_number(rng)
    return f"number: {spell(value)}\n", str(value)


def roman_numeral(rng: Random) -> tuple[str, str]:
    """Digits to roman numerals."""
    value = rng.randrange(1, 4000)
    return f"roman: {value}\n", roman(value)


def date(rng: Random) -> tuple[str, str]:
    """ISO date to a written one."""
    year, month, day = rng.randrange(1900, 2100), rng.randrange(12), rng.randrange(1, 29)
    return f"date: {year}-{month + 1:02d}-{day:02d}\n", f"{day} {_MONTHS[month]} {year}"


def json_object(rng: Random) -> tuple[str, str]:
    """key=value pairs to a JSON object."""
    keys = rng.sample([*_VALUES, "age"], rng.choice((2, 3, 4)))
    values = [str(rng.randrange(1, 100)) if key == "age" else rng.choice(_VALUES[key]) for key in keys]
    pairs = list(zip(keys, values, strict=True))
    members = ", ".join(f'"{key}": {value}' if key == "age" else f'"{key}": "{value}"' for key, value in pairs)
    return f"json: {' '.join(f'{key}={value}' for key, value in pairs)}\n", f"{{{members}}}"


def reverse(rng: Random) -> tuple[str, str]:
    """A list of words, last first."""
    chosen = rng.choices(_WORDS, k=rng.choice((3, 4, 5, 6)))
    return f"reverse: {' '.join(chosen)}\n", " ".join(reversed(chosen))


FAMILIES: dict[str, Family] = {
    "words": words,
    "number": number,
    "roman": roman_numeral,
    "date": date,
    "json": json_object,
    "reverse": reverse,
}
