"""Every instance has a checkable answer, the stream repeats itself, and no test prompt is ever trained on."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from twotower.demo.batches import training_instances
from twotower.demo.corpus import CORPUS_FILE, Instance, families_of, held_out, save_families, stream
from twotower.demo.families import FAMILIES, SHARES
from twotower.demo.families.numerals import roman, spell
from twotower.demo.recipe import STAGES
from twotower.demo.tokenizer import _texts
from twotower.errors import CheckpointError, ConfigError


def test_a_stream_is_decided_by_its_seed() -> None:
    first, again, other = (list(islice(stream("train", seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_no_prompt_is_on_both_sides_of_the_split() -> None:
    train = {instance.prompt for instance in islice(stream("train", 0), 5000)}
    test = {instance.prompt for instance in islice(stream("test", 0), 2000)}
    assert not train & test


def test_neither_training_nor_the_tokenizer_reads_a_held_out_prompt() -> None:
    held = {instance.prompt for family in FAMILIES for instance in held_out(family, 200)}
    trained = [i for stage in STAGES for step in range(100) for i in training_instances(0, stage, step, 48)]
    assert len(trained) == 9600
    assert not held & {instance.prompt for instance in trained}
    assert not held & set(_texts(5000, 0))


def test_every_family_appears_as_often_as_its_share_says() -> None:
    drawn = [instance.family for instance in islice(stream("train", 0), 6000)]
    shares = {name: SHARES.get(name, 1) for name in FAMILIES}
    assert set(drawn) == set(FAMILIES) >= set(SHARES)
    for name, share in shares.items():
        assert abs(drawn.count(name) / 6000 - share / sum(shares.values())) < 0.02, name


@pytest.mark.parametrize("family", FAMILIES)
def test_two_hundred_different_instances_are_held_out(family: str) -> None:
    instances = held_out(family, 200)
    assert len({instance.prompt for instance in instances}) == 200
    assert {(instance.family, instance.split) for instance in instances} == {(family, "test")}
    assert held_out(family, 3, after=100) == instances[100:103]


def test_a_family_that_has_too_few_says_so() -> None:
    with pytest.raises(ConfigError, match="roman: wanted 600 test instances, found only"):
        held_out("roman", 600)


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


def _record(text: str) -> dict[str, str]:
    """A record in JSON, CSV or key=value form, read by other code than what wrote it."""
    if text.startswith("{"):
        return {key: str(value) for key, value in json.loads(text).items()}
    if ";" in text:
        head, row = text.split(";")
        return dict(zip(head.split(","), row.split(","), strict=True))
    return dict(pair.split("=") for pair in text.split(" "))


def _day(text: str) -> datetime:
    formats = "%d %B %Y", "%Y-%m-%d", "%m/%d/%Y", "%d.%m.%Y"
    for format_ in formats:
        with suppress(ValueError):
            return datetime.strptime(text, format_)
    raise AssertionError(f"{text} is no date")


def _closed(opened: str, closing: str) -> bool:
    """Whether brackets match: pairs are struck out until nothing changes."""
    text = (opened + closing).replace(" ", "")
    while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", text)) != text:
        text = shorter
    return text == ""


def _runs(specification: str, source: str) -> bool:
    """Whether the function does to 5 what the words say."""
    name = specification.split()[0]
    scope: dict[str, Any] = {}
    exec(source, scope)
    value = 5
    for words, number in re.findall(r"(add|subtract|multiply by) (\d)", specification):
        value = {"add": value + int(number), "subtract": value - int(number), "multiply by": value * int(number)}[words]
    return bool(scope[name](5) == value)


def _story(prompt: str, answer: str) -> bool:
    has, boxes, inside, given = map(int, re.findall(r"\d+", prompt))
    equations = re.findall(r"(\d+)([x+-])(\d+)=(\d+)", answer)
    right = {"x": int.__mul__, "+": int.__add__, "-": int.__sub__}
    sound = all(right[sign](int(left), int(other)) == int(out) for left, sign, other, out in equations)
    return len(equations) == 3 and sound and str(has + boxes * inside - given) == answer.split()[-2]


def _told(prompt: str, answer: str) -> bool:
    facts = _record(prompt)
    return all(value in answer.lower().rstrip(".").replace(",", "").split() for value in facts.values())


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "date": lambda prompt, answer: _day(prompt) == _day(answer),
    "json": lambda prompt, answer: _record(prompt) == _record(answer) and answer.startswith("{"),
    "table": lambda prompt, answer: _record(prompt) == _record(answer),
    "describe": _told,
    "reverse": lambda prompt, answer: answer.split()[::-1] == prompt.split(),
    "sort": lambda prompt, answer: answer.split() == sorted(prompt.split(), key=int),
    "brackets": _closed,
    "add": lambda prompt, answer: sum(map(int, prompt.split())) == int(answer.split()[-1]),
    "problem": _story,
    "code": _runs,
}


@pytest.mark.parametrize("family", CHECKS)
def test_answers_agree_with_an_independent_reading_of_the_prompt(family: str) -> None:
    for instance in held_out(family, 100):
        assert CHECKS[family](instance.prompt.split(": ", 1)[1].rstrip("\n"), instance.answer), instance


def test_counting_agrees_with_the_list() -> None:
    for instance in held_out("count", 100):
        wanted, listed = instance.prompt.removeprefix("count ").split(": ")
        assert instance.answer.endswith(f": {listed.split().count(wanted)}")
        assert re.sub(r" \d+", "", instance.answer.split(":")[0]).split(", ") == listed.split()


def test_a_checkpoint_is_asked_what_it_was_trained_on(tmp_path: Path) -> None:
    assert families_of(tmp_path) == tuple(FAMILIES)
    save_families(tmp_path)
    assert families_of(tmp_path) == tuple(FAMILIES)
    (tmp_path / CORPUS_FILE).write_text('{"families": ["sort", "words"]}')
    assert families_of(tmp_path) == ("words", "sort")
    drawn = {instance.family for instance in islice(stream("test", 0, known=families_of(tmp_path)), 50)}
    assert drawn == {"words", "sort"}
    for text, said in (
        ("[", "not a list of families"),
        ('{"families": ["sums"]}', "got ['sums'], wanted some of words"),
    ):
        (tmp_path / CORPUS_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=re.escape(said)):
            families_of(tmp_path)


def test_only_the_right_answer_is_right() -> None:
    instance = Instance("words", "words: 7\n", "seven")
    assert instance.is_answered_by("seven") and instance.is_answered_by(" seven\n")
    assert not instance.is_answered_by("seventy") and not instance.is_answered_by("")
