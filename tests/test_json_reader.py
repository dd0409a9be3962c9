"""JSON read piece by piece: the same values and the same complaints as `json`, and no long piece at a time."""

import json
import random
from typing import Any

import pytest

from twotower.json_reader import MAX_VALUES, PieceReader

BROKEN = """[,1] | [1,,2] | [1,] | [1 2] | [1,2 | [ | { | {"a"} | {"a":1,} | {"a":1 "b":2} | [1]x | [01] | [-] | [1,.5]
| nul | "a | [1,2,"a" 3] | {1:2} | [e,1] | [1,2} | {"a":[1,2} | [1,2]] |  | , | [1,2,] | {,} | [[1,2] 3] | [1e,2]"""


def no_constant(name: str) -> object:
    raise ValueError(name)


def read(text: str) -> Any:
    return PieceReader(text, dict, no_constant).read()


@pytest.mark.parametrize("text", [part.strip() for part in BROKEN.split("|")])
def test_what_is_broken_is_refused_with_jsons_own_words(text: str) -> None:
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as caught:
        read(text)
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("numbers", [0, 1, 2, 5000])
def test_a_mistake_behind_many_numbers_is_told_where_it_is(numbers: int) -> None:
    test_what_is_broken_is_refused_with_jsons_own_words("[" + "100, " * numbers + "1.e5, 7]")


def drawn(random_: random.Random, depth: int = 0) -> object:
    kind = random_.randrange(5 if depth < 4 else 3)
    if kind == 0:
        return random_.choice([None, True, False, 'x é\n"[', "", -1, 2.5, 1e300, 10**30])
    if kind == 1:
        return [random_.choice([random_.randrange(10**9), random_.random(), -7]) for _ in range(random_.randrange(4))]
    if kind == 2:
        return list(range(random_.choice([0, 1, 1500, 9000])))
    if kind == 3:
        return [drawn(random_, depth + 1) for _ in range(random_.randrange(5))]
    return {str(random_.random()): drawn(random_, depth + 1) for _ in range(random_.randrange(5))}


@pytest.mark.parametrize("seed", range(20))
def test_values_are_those_of_json(seed: int) -> None:
    value = drawn(random.Random(seed))
    for indent in (None, 1):
        assert read(json.dumps(value, indent=indent)) == value


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_are_the_callers_business(constant: str) -> None:
    with pytest.raises(ValueError, match=f"^{constant}$"):
        read(f"[1, 2, {constant}]")


@pytest.mark.parametrize("value", ['""', "[]", "{}", "null", '{"a": 1}', "[1]"])
def test_values_are_bounded_but_for_the_numbers_in_arrays(value: str) -> None:
    asked = MAX_VALUES // 2 - 1
    assert len(read("[" + ", ".join([value] * asked) + "]")) == asked
    with pytest.raises(ValueError, match="more than 4096 values beside the numbers in arrays"):
        read("[" + ", ".join([value] * (MAX_VALUES + 1)) + "]")
    assert len(read(f"[{'9,' * 100_000} 9]")) == 100_001


def test_no_call_of_json_reads_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps the lock is one call of `json`. It is given a few thousand numbers at most."""
    given = list[int]()

    def loads(text: str) -> Any:
        given.append(len(text))
        return json.JSONDecoder().decode(text)

    monkeypatch.setattr("twotower.json_reader.json.loads", loads)
    assert read(f"[{'100000, ' * 100_000} 9]")[-2:] == [100_000, 9]
    assert len(given) > 90 and max(given) <= 8194
