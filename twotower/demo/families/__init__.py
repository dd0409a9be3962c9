"""Task families of the demo corpus: each draws one prompt and the only right answer.

Knows nothing about tokens or the train/test split.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from twotower.demo.families.arithmetic import add, problem
from twotower.demo.families.lists import brackets, count, reverse, sort
from twotower.demo.families.long import module, people, rows, steps
from twotower.demo.families.numerals import date, number, roman_numeral, words
from twotower.demo.families.records import describe, json_object, table
from twotower.demo.families.source import code

Family = Callable[[Random], tuple[str, str]]

FAMILIES: dict[str, Family] = {
    "words": words,
    "number": number,
    "roman": roman_numeral,
    "date": date,
    "json": json_object,
    "table": table,
    "describe": describe,
    "reverse": reverse,
    "sort": sort,
    "count": count,
    "brackets": brackets,
    "add": add,
    "problem": problem,
    "code": code,
    "rows": rows,
    "people": people,
    "steps": steps,
    "module": module,
}
LONG = frozenset(("rows", "people", "steps", "module"))
"""Those whose answers run to many blocks."""
SHARES: dict[str, int] = {
    "sort": 2, "count": 2, "brackets": 2, "add": 3, "problem": 2, "table": 2, "rows": 3, "people": 2,
    "steps": 4, "module": 3,
}  # fmt: skip
"""How often training draws a family, where that is not once: the harder ones more often."""
