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
from twotower.demo.recipe import STAGES, continued
from twotower.demo.tokenizer import _texts
from twotower.errors import CheckpointError, ConfigError

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


def test_a_stream_is_decided_by_its_seed() -> None:
    first, again, other = (list(islice(stream("train", seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_no_prompt_is_on_both_sides_of_the_split() -> None:
    train = {instance.prompt for instance in islice(stream("train", 0), 5000)}
    test = {instance.prompt for instance in islice(stream("test", 0), 2000)}
    assert not train & test


@pytest.mark.slow
def test_neither_training_nor_the_tokenizer_reads_a_held_out_prompt() -> None:
    held = {instance.prompt for family in FAMILIES for instance in held_out(family, 200)}
    trained = [i for stage in STAGES for step in range(100) for i in training_instances(0, stage, step, 48)]
    assert len(trained) == 9600
    assert not held & {instance.prompt for instance in trained}
    assert not held & set(_texts(5000, 0))


@pytest.mark.slow
def test_not_one_of_all_the_batches_does() -> None:
    """Every train step with which a checkpoint goes on."""
    held = {instance.prompt for family in FAMILIES for instance in held_out(family, 300 + 2)}
    recipe, seen = continued(), 0
    for stage in STAGES:
        of_stage = recipe.context if stage == "context" else recipe.denoiser
        for step in range(of_stage.train_steps):
            for instance in training_instances(recipe.seed, stage, step, of_stage.batch_size):
                seen += 1
                assert instance.prompt not in held, (stage, step)
    assert seen == (300 + 800) * 24


def test_every_family_appears_as_often_as_its_share_says() -> None:
    drawn = [instance.family for instance in islice(stream("train", 0), 6000)]
    shares = {name: SHARES.get(name, 1) for name in FAMILIES}
    assert set(drawn) == set(FAMILIES) >= set(SHARES)
    for name, share in shares.items():
        assert abs(drawn.count(name) / 6000 - share / sum(shares.values())) < 0.02, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
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


def _read_words(text: str) -> int:
    """A number in words, read by other code than what wrote it."""
    values = {spell_out: n for n, spell_out in enumerate(_SMALL.split())}
    values |= {spell_out: 10 * n for n, spell_out in enumerate(_TENS.split(), 2)}
    total, part = 0, 0
    for word in text.replace("-", " ").split():
        if word in ("hundred", "thousand"):
            part *= 100 if word == "hundred" else 1000
            total, part = total + part, 0
        elif word != "and":
            part += values[word]
    return total + part


def _read_roman(text: str) -> int:
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}[letter] for letter in text]
    return sum(-own if own < after else own for own, after in zip(values, [*values[1:], 0], strict=True))


def test_every_number_is_written_so_that_it_is_read_again() -> None:
    assert all(_read_words(spell(number)) == number for number in range(10_000))
    assert len({spell(number) for number in range(10_000)}) == 10_000
    assert all(_read_roman(roman(number)) == number for number in range(1, 4000))
    assert not any(re.search(r"(.)\1\1\1|VV|LL|DD|I[LCDM]|X[DM]", roman(number)) for number in range(1, 4000))


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
    """Whether the function does what the words say, to numbers that no other steps of one digit treat alike."""
    name = specification.split()[0]
    scope: dict[str, Any] = {}
    exec(source, scope)
    steps = re.findall(r"(add|subtract|multiply by) (\d)", specification)
    assert len(steps) == specification.count(" then ") + 1 == source.count(" = ")
    return all(scope[name](given) == _done(given, steps) for given in (-1000, 0, 1, 5, 10**6))


def _done(value: int, steps: list[tuple[str, str]]) -> int:
    for words, number in steps:
        value = {"add": value + int(number), "subtract": value - int(number), "multiply by": value * int(number)}[words]
    return value


def _added(prompt: str, answer: str) -> bool:
    """The sum, and every digit and carry on the way to it."""
    first, second = (text[::-1] for text in prompt.split())
    *steps, so, total = answer.split()
    carries = [0]
    for place, step in enumerate(steps):
        [digits_and_sum] = re.findall(r"^(\d)\+(\d)\+(\d)=(\d\d)$", step)
        left, right, carry, out = map(int, digits_and_sum)
        digits = [int(text[place : place + 1] or 0) for text in (first, second)]
        if [left, right] != digits or carry != carries[-1] or out != left + right + carry:
            return False
        carries.append(out // 10)
    longest = max(len(first), len(second))
    return so == "so" and len(steps) == longest and int(total) == sum(map(int, prompt.split()))


def _story(prompt: str, answer: str) -> bool:
    has, boxes, inside, given = map(int, re.findall(r"\d+", prompt))
    equations = re.findall(r"(\d+)([x+-])(\d+)=(\d+)", answer)
    right = {"x": int.__mul__, "+": int.__add__, "-": int.__sub__}
    sound = all(right[sign](int(left), int(other)) == int(out) for left, sign, other, out in equations)
    return len(equations) == 3 and sound and str(has + boxes * inside - given) == answer.split()[-2]


def _told(prompt: str, answer: str) -> bool:
    facts = _record(prompt)
    return all(value in answer.lower().rstrip(".").replace(",", "").split() for value in facts.values())


def _table(text: str) -> list[dict[str, str]]:
    """Records one a line; the first line of CSV names the fields."""
    lines = text.split("\n")
    if "=" in text or text.startswith("{"):
        return [_record(line) for line in lines]
    return [_record(f"{lines[0]};{line}") for line in lines[1:]]


def _same_table(prompt: str, answer: str) -> bool:
    rows = _table(answer)
    form = "json" if answer.startswith("{") else "pairs"
    wanted, given = prompt.split(": ", 1)
    return wanted == form and 5 <= len(rows) <= 8 and rows == _table(given.replace(";", "\n"))


def _all_told(prompt: str, answer: str) -> bool:
    people, sentences = prompt.split("; "), answer.removesuffix(".").split(". ")
    return len(people) == len(sentences) and all(map(_told_of, people, sentences))


def _told_of(person: str, sentence: str) -> bool:
    given = person.split()
    return [word for word in sentence.split() if word in given] == given


def _steps_hold(prompt: str, answer: str) -> bool:
    asked, lines = prompt.split("; "), answer.split("\n")
    for line, calculation in zip(lines, asked, strict=True):
        name, expression = calculation.split()
        key, product, total = line.split(" ")
        left, right, added = map(int, re.split(r"[x+]", expression))
        if (
            key != f"{name}:"
            or product != f"{left}x{right}={left * right}"
            or total != f"{left * right}+{added}={left * right + added}"
        ):
            return False
    return 4 <= len(lines) <= 8


def _module_runs(prompt: str, answer: str) -> bool:
    specifications, sources = prompt.split("; "), answer.split("\n\n")
    return len(specifications) == len(sources) and all(map(_runs, specifications, sources))


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "words": lambda prompt, answer: _read_words(answer) == int(prompt),
    "number": lambda prompt, answer: int(answer) == _read_words(prompt) and answer == str(int(answer)),
    "roman": lambda prompt, answer: _read_roman(answer) == int(prompt),
    "date": lambda prompt, answer: _day(prompt) == _day(answer),
    "json": lambda prompt, answer: _record(prompt) == _record(answer) and answer.startswith("{"),
    "table": lambda prompt, answer: _record(prompt) == _record(answer),
    "describe": _told,
    "reverse": lambda prompt, answer: answer.split()[::-1] == prompt.split(),
    "sort": lambda prompt, answer: answer.split() == sorted(prompt.split(), key=int),
    "brackets": _closed,
    "add": _added,
    "problem": _story,
    "code": _runs,
    "rows": _same_table,
    "people": _all_told,
    "steps": _steps_hold,
    "module": _module_runs,
}


def test_every_family_is_checked() -> None:
    assert {*CHECKS, "count"} == set(FAMILIES)


@pytest.mark.parametrize("family", CHECKS)
def test_answers_agree_with_an_independent_reading_of_the_prompt(family: str) -> None:
    for instance in held_out(family, 100):
        assert CHECKS[family](_asked(instance), instance.answer), instance


def _asked(instance: Instance) -> str:
    """The prompt without the word that names its family; of `rows` what is wanted stays."""
    prompt = instance.prompt.rstrip("\n")
    named = instance.family == "rows"
    return prompt.split(" " if named else ": ", 1)[1]


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
