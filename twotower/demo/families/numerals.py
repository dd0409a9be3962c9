"""Numbers and dates in other notations."""

from __future__ import annotations

from random import Random

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
    """A date in one of four formats into another; the prompt's first word names the one wanted."""
    year, month, day = rng.randrange(1900, 2100), rng.randrange(1, 13), rng.randrange(1, 29)
    written = {
        "date": f"{day} {_MONTHS[month - 1]} {year}",
        "iso": f"{year}-{month:02d}-{day:02d}",
        "us": f"{month:02d}/{day:02d}/{year}",
        "eu": f"{day:02d}.{month:02d}.{year}",
    }
    given, wanted = rng.sample(list(written), 2)
    return f"{wanted}: {written[given]}\n", written[wanted]
