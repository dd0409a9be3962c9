"""Small records in JSON, CSV and key=value form, and told in a sentence."""

from __future__ import annotations

from random import Random

_VALUES: dict[str, tuple[str, ...]] = {
    "name": tuple("ann bob eve tom kim sam max zoe".split()),
    "city": tuple("rome oslo paris lima cairo delhi".split()),
    "pet": tuple("cat dog fox owl bee ant".split()),
    "color": tuple("red blue green gold pink gray".split()),
}
_SENTENCES = {"city": "lives in {}", "pet": "has a pet {}", "color": "likes {}", "age": "is {} years old"}

Record = dict[str, str]


def _record(rng: Random, fields: int) -> Record:
    keys = rng.sample([*_VALUES, "age"], fields)
    return {key: str(rng.randrange(10, 100)) if key == "age" else rng.choice(_VALUES[key]) for key in keys}


def _pairs(record: Record) -> str:
    return " ".join(f"{key}={value}" for key, value in record.items())


def _json(record: Record) -> str:
    members = (f'"{key}": {value}' if key == "age" else f'"{key}": "{value}"' for key, value in record.items())
    return f"{{{', '.join(members)}}}"


def _csv(record: Record) -> str:
    return f"{','.join(record)};{','.join(record.values())}"


def json_object(rng: Random) -> tuple[str, str]:
    """key=value pairs or a CSV head and row to a JSON object."""
    record = _record(rng, rng.choice((2, 3, 4)))
    given = rng.choice((_pairs, _pairs, _csv))
    return f"json: {given(record)}\n", _json(record)


def table(rng: Random) -> tuple[str, str]:
    """A JSON object or pairs to a CSV head and row; a JSON object or CSV to pairs."""
    record = _record(rng, rng.choice((2, 3, 4)))
    if rng.random() < 0.5:
        return f"csv: {rng.choice((_json, _pairs))(record)}\n", _csv(record)
    return f"pairs: {rng.choice((_json, _csv))(record)}\n", _pairs(record)


def describe(rng: Random) -> tuple[str, str]:
    """A sentence from facts, in the order they are given."""
    name = rng.choice(_VALUES["name"])
    facts = {key: value for key, value in _record(rng, rng.choice((3, 4))).items() if key != "name"}
    told = [_SENTENCES[key].format(value) for key, value in facts.items()]
    listed = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    return f"describe: name={name} {_pairs(facts)}\n", f"{name.capitalize()} {listed}."
