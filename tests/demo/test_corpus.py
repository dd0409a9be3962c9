"""Every instance has a checkable answer, the stream repeats itself, and no test prompt is ever trained on."""

import json
import re
from itertools import islice

import pytest

from twotower.demo.corpus import Instance, held_out, stream
from twotower.demo.families import FAMILIES, roman, spell


def test_a_stream_is_decided_by_its_seed() -> None:
    first, again, other = (list(islice(stream("train", seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_no_prompt_is_on_both_sides_of_the_split() -> None:
    train = {instance.prompt for instance in islice(stream("train", 0), 5000)}
    test = {instance.prompt for instance in islice(stream("test", 0), 2000)}
    assert not train & test


def test_all_families_appear_in_equal_shares() -> None:
    drawn = [instance.family for instance in islice(stream("train", 0), 3000)]
    assert set(drawn) == set(FAMILIES)
    assert all(abs(drawn.count(name) / 3000 - 1 / len(FAMILIES)) < 0.05 for name in FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_hundred_different_instances_are_held_out(family: str) -> None:
    instances = held_out(family, 200)
    assert len({instance.prompt for instance in instances}) == 200
    assert {(instance.family, instance.split) for instance in instances} == {(family, "test")}


@pytest.mark.parametrize(
    ("value", "words", "numeral"),
    [
        (4, "four", "IV"),
        (40, "forty", "XL"),
        (115, "one hundred and fifteen", "CXV"),
        (1999, "one thousand nine hundred and ninety-nine", "MCMXCIX"),
        (3005, "three thousand and five", "MMMV"),
    ],
)
def test_numbers_are_written_right(value: int, words: str, numeral: str) -> None:
    assert (spell(value), roman(value)) == (words, numeral)


def test_answers_agree_with_an_independent_reading_of_the_prompt() -> None:
    for instance in held_out("json", 50):
        pairs = dict(re.findall(r"(\w+)=(\w+)", instance.prompt))
        assert {key: str(value) for key, value in json.loads(instance.answer).items()} == pairs
    for instance in held_out("reverse", 50):
        assert instance.answer.split()[::-1] == instance.prompt.split()[1:]


def test_only_the_right_answer_is_right() -> None:
    instance = Instance("words", "words: 7\n", "seven")
    assert instance.is_answered_by("seven") and instance.is_answered_by(" seven\n")
    assert not instance.is_answered_by("seventy") and not instance.is_answered_by("")
