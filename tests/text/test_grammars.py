"""Which tokens may come next: against the description itself, tried on every token."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

import twotower
from twotower.constraints import Constraint
from twotower.errors import InvalidRequest
from twotower.text.grammars import Grammars, TextMatcher
from twotower.text.tokenizer import load_tokenizer

DEMO = Path(twotower.__file__).parent / "demo" / "checkpoint"
VOCAB, EOS = 512, 2


@cache
def _grammars() -> Grammars:
    return Grammars(DEMO, VOCAB, EOS)


@cache
def _texts() -> list[str]:
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer is not None
    return [tokenizer.decode([token]) for token in range(VOCAB)]


def _allowed(mask: bytes) -> set[int]:
    return {token for token in range(VOCAB) if mask[token // 8] >> token % 8 & 1}


def _next(matcher: TextMatcher) -> set[int]:
    [mask] = matcher.masks([], 0, 1)
    return _allowed(mask)


def _ids(text: str) -> list[int]:
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer is not None
    return tokenizer.encode_continuation(text)


@pytest.mark.parametrize(
    ("constraint", "begins", "whole"),
    [
        (Constraint("regex", "[0-9]{3}"), "[0-9]{0,3}", "[0-9]{3}"),
        (Constraint("choice", json.dumps(["12", "1.5"])), r"1?|12|1\.5?", r"12|1\.5"),
        (Constraint("grammar", 'start: "1" start | "2"'), "1*2?", "1*2"),
    ],
)
def test_the_tokens_that_may_come_are_those_that_the_description_has_a_place_for(
    constraint: Constraint, begins: str, whole: str
) -> None:
    """Of every token that is text, after each text of up to two of them; EOS where the text is whole."""
    texts = _texts()
    fitting = [token for token in range(4, VOCAB) if texts[token] and re.fullmatch(begins, texts[token])]
    assert fitting
    for before in [[], *([token] for token in fitting[-3:]), *([a, b] for a in fitting[:3] for b in fitting[-2:])]:
        said = "".join(texts[token] for token in before)
        if not re.fullmatch(begins, said):
            continue
        matcher = _grammars().matcher(constraint)
        matcher.follow(before)
        wanted = {token for token in range(4, VOCAB) if texts[token] and re.fullmatch(begins, said + texts[token])}
        assert _next(matcher) == wanted | ({EOS} if re.fullmatch(whole, said) else set()), said
        assert matcher.fault is None


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("wrong", [None, 0, 3])
def test_the_masks_of_a_draft_are_those_of_one_token_at_a_time(first: int, wrong: int | None) -> None:
    """And the matcher is where it was. Behind a token that may not come nothing counts."""
    schema = '{"properties": {"a": {"enum": [17, "x"]}}, "required": ["a"], "additionalProperties": false}'
    constraint = Constraint("json", schema)
    draft = _ids('{"a": 17}')
    assert len(draft) > 4
    if wrong is not None:
        draft[wrong] = next(token for token in range(4, VOCAB) if _texts()[token] == "z")
    together, alone = _grammars().matcher(constraint), _grammars().matcher(constraint)
    count = len(draft) + 1 - first
    masks, before = together.masks(draft, first, count), _next(together)
    assert len(masks) == count and before == _next(alone)
    for place in range(len(draft) + 1 if wrong is None else wrong + 1):
        if place >= first:
            assert _allowed(masks[place - first]) == _next(alone)
        alone.follow(draft[place : place + 1])
    if wrong is not None:
        assert alone.fault is not None and together.fault is None


def _object(of: Sequence[str]) -> str:
    return json.dumps({"type": "object", "properties": {name: {"type": "string"} for name in of}})


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Constraint("json", "{"), "json: "),
        (Constraint("json", '{"type": "objec"}'), "json: Invalid type: objec"),
        (Constraint("json", '{"$ref": "http://example.com/schema"}'), "retrieving it failed"),
        (Constraint("json", '{"not": {"type": "string"}}'), 'Unimplemented keys: \\["not"\\]'),
        (Constraint("json", '{"properties":{"a":' * 300 + "{}" + "}}" * 300), "recursion limit"),
        (Constraint("regex", "(a|b"), "regex: .*unclosed group"),
        (Constraint("grammar", "start: other"), 'grammar: .*unknown name: "other"'),
        (Constraint("grammar", ""), "grammar: "),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_short_line(constraint: Constraint, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        _grammars().matcher(constraint)
    [problem] = caught.value.problems
    assert problem.field == "structured_outputs" and "\n" not in problem.message and len(problem.message) <= 300


def test_where_there_is_nothing_to_follow_a_text_with(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidRequest, match=r"structured_outputs: not served here: the checkpoint has no tokenizer\.json"
    ):
        Grammars(tmp_path, VOCAB, EOS).matcher(Constraint("json_object", ""))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="not served here: the checkpoint's tokenizer cannot be followed"):
        Grammars(tmp_path, VOCAB, EOS).matcher(Constraint("json_object", ""))


def test_compiled_ones_are_kept_those_that_were_asked_for_last() -> None:
    grammars, first = Grammars(DEMO, VOCAB, EOS), Constraint("choice", '["0"]')
    assert first not in grammars
    for number in range(40):
        grammars.matcher(Constraint("choice", json.dumps([str(number)])))
        grammars.matcher(first)
    assert first in grammars and Constraint("choice", '["1"]') not in grammars


def test_two_texts_of_one_grammar_do_not_meet() -> None:
    one, other = (_grammars().matcher(Constraint("regex", "[0-9]{3}")) for _ in range(2))
    one.follow(_ids("123"))
    assert _next(one) == {EOS} and EOS not in _next(other)
