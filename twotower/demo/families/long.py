"""Tasks whose answers run to many blocks: tables, prose about several people, a running balance, several functions.

Lines of one answer have one shape and nearly one length, so that a block of 16 can be filled in any order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random

from twotower.demo.families.source import function

_NAMES = "Ann Bob Eve Kim Max Sam Tom Zoe".split()
_VALUES = {
    "pet": "cat dog fox owl bee ant".split(),
    "color": "red blue green gold pink gray".split(),
    "coins": (),
    "age": (),
}
_SENTENCES = {"pet": "has a pet {}", "color": "likes {}", "age": "is {} years old", "coins": "has {} coins"}
_FUNCTIONS = "f g h k m p t".split()
_ROWS_OF_STEPS = {1: (4, 5, 6, 7), 2: (3, 4, 5, 6), 3: (2, 3, 4, 5)}

Row = dict[str, str]


def _people(rng: Random, columns: Sequence[str], count: int) -> list[Row]:
    """Rows with the same columns in the same order; no name comes twice."""
    names = rng.sample(_NAMES, count)
    return [{column: name if column == "name" else _value(rng, column) for column in columns} for name in names]


def _value(rng: Random, column: str) -> str:
    return rng.choice(_VALUES[column]) if _VALUES[column] else str(rng.randrange(10, 100))


def _json_rows(rows: list[Row]) -> list[str]:
    return [json.dumps({key: int(text) if text.isdigit() else text for key, text in row.items()}) for row in rows]


def _csv_rows(rows: list[Row]) -> list[str]:
    return [",".join(rows[0]), *(",".join(row.values()) for row in rows)]


def _pairs_rows(rows: list[Row]) -> list[str]:
    return [" ".join(f"{key}={text}" for key, text in row.items()) for row in rows]


def rows(rng: Random) -> tuple[str, str]:
    """A table of four to eight rows from CSV, JSON or pairs to lines of another of these, most often to JSON."""
    columns = ["name", *rng.sample(list(_VALUES), rng.choice((1, 2, 2, 3)))]
    rng.shuffle(columns)
    table = _people(rng, columns, rng.randrange(4, 9))
    written = {"csv": _csv_rows(table), "json": _json_rows(table), "pairs": _pairs_rows(table)}
    wanted = rng.choice(("json", "json", "pairs", "csv"))
    given = rng.choice([form for form in written if form != wanted])
    return f"rows {wanted}: {';'.join(written[given])}\n", "\n".join(written[wanted])


def people(rng: Random) -> tuple[str, str]:
    """A sentence about each of four to eight people, from facts in the order they are given."""
    facts = rng.sample(list(_VALUES), rng.choice((3, 3, 4)))
    table = _people(rng, ["name", *facts], rng.randrange(4, 9))
    sentences = []
    for row in table:
        *told, last = [_SENTENCES[key].format(text) for key, text in row.items() if key != "name"]
        sentences.append(f"{row['name']} {', '.join(told)} and {last}.")
    return f"people: {'; '.join(_pairs_rows(table))}\n", " ".join(sentences)


def balance(rng: Random) -> tuple[str, str]:
    """A balance of two digits over four to nine days, each of which adds or subtracts a digit."""
    start = now = rng.randrange(20, 90)
    told, lines = [], []
    for day in range(1, rng.randrange(5, 11)):
        change = rng.randrange(1, 10)
        added = now < 19 or (now <= 90 and rng.random() < 0.5)
        after = now + change if added else now - change
        told.append(f"{day} {'add' if added else 'subtract'} {change}")
        lines.append(f"day {day}: {now} {'add' if added else 'subtract'} {change} = {after}")
        now = after
    return f"balance: {start}; {'; '.join(told)}\n", "\n".join(lines)


def module(rng: Random) -> tuple[str, str]:
    """Several functions, each of which does equally many things to its argument, one a line."""
    steps = rng.choice(list(_ROWS_OF_STEPS))
    names = rng.sample(_FUNCTIONS, rng.choice(_ROWS_OF_STEPS[steps]))
    told, sources = zip(*(function(rng, name, rng.choice("xyn"), steps) for name in names), strict=True)
    return f"module: {'; '.join(told)}\n", "\n\n".join(sources)
