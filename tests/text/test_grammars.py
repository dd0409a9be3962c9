"""Which tokens may come next: against the description itself, tried on every token."""

import json
import re
import time
from collections.abc import Sequence
from functools import cache
from itertools import count
from pathlib import Path

import pytest

import twotower
from twotower.constraints import Constraint
from twotower.errors import InvalidRequest
from twotower.text import grammars as module
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
        (Constraint("grammar", "start: start"), "grammar: no token of this tokenizer may come next"),
        (Constraint("grammar", "start: <[99999]>"), "grammar: "),
        (Constraint("json", '{"allOf":[{"$ref":"#"}]}'), "json: no token of this tokenizer may come next"),
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


COSTLY = Constraint("regex", "(.{1,1000}){1,30}")  # goes beyond a bound after some sixty tokens " a"
BREAKS_IN_A_DRAFT = Constraint("grammar", 'start: "x" /(a{60000}){60000}/ | "xy1"')


def test_one_that_goes_beyond_a_bound_leaves_its_grammar_to_all_others() -> None:
    """To a text that is half-way, and to those that come later."""
    broken, beside, [token] = _grammars().matcher(COSTLY), _grammars().matcher(COSTLY), _ids(" a")
    beside.follow([token] * 3)
    for _ in count():
        _next(broken)
        broken.follow([token])
        if broken.fault is not None:
            break
    assert broken.fault == "lexer error: too many expressions constructed"
    for other in (beside, _grammars().matcher(COSTLY)):
        assert token in _next(other)
        other.follow([token])
        assert token in _next(other) and other.fault is None


def test_a_draft_that_goes_beyond_a_bound_costs_the_text_nothing() -> None:
    """Where the draft cannot be followed no token may come; the text itself goes on, and so do its masks."""
    matcher, draft = _grammars().matcher(BREAKS_IN_A_DRAFT), _ids("xaaaa")
    masks = [_allowed(mask) for mask in matcher.masks(draft, 0, len(draft) + 1)]
    assert masks[0] and masks[1] and not masks[-1] and matcher.fault is None
    x, a, y = (_ids(text)[0] for text in "xay")
    matcher.follow([x])
    assert _next(matcher) == {a, y} and matcher.fault is None
    matcher.follow([y])
    for again in (matcher.masks(draft, 0, 3), matcher.masks(draft, 1, 2)):
        assert not any(map(any, again[-2:]))
    assert _next(matcher) == set(_ids("1")) and matcher.fault is None


@pytest.mark.parametrize(
    ("grammar", "draft"),
    [
        ('start: "a" <[300]> "b"', ["a", 300, "b"]),
        ('start: g "x"\ng[max_tokens=3]: /[a-z]+/', ["a", "b", "c", "x"]),
        ('start: g "x"\ng[stop="q"]: /[a-z]+/', ["a", "b", "q", "x"]),
        ('start: g "x"\ng[lazy]: /[a-z]+q/', ["a", "b", "q", "x"]),
    ],
)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_draft_leaves_the_text_where_it_was(grammar: str, draft: list[str | int], first: int) -> None:
    """Also of grammars whose automaton cannot take a token back."""
    tokens = [one if isinstance(one, int) else _ids(one)[0] for one in draft]
    drafted, alone = (_grammars().matcher(Constraint("grammar", grammar)) for _ in range(2))
    for place in range(len(tokens)):
        rest, wanted = tokens[place:], _next(alone)
        masks = drafted.masks(rest, min(first, len(rest)), len(rest) + 1 - min(first, len(rest)))
        assert _next(drafted) == wanted and drafted.fault is None
        if first == 0:
            assert _allowed(masks[0]) == wanted
        ahead = _grammars().matcher(Constraint("grammar", grammar))
        for step, token in enumerate([*tokens, None]):
            if place + first <= step < len(tokens):
                assert _allowed(masks[step - place - first]) == _next(ahead)
            if token is not None:
                ahead.follow([token])
        for one in (drafted, alone):
            one.follow([tokens[place]])


@pytest.mark.parametrize("text", ["(a{60000}){60000}", "a{1000000}"])
def test_the_first_mask_is_bounded_by_the_librarys_fuel(text: str) -> None:
    """Twenty times below a second, which the compilation may take at most, on any machine that tests run on."""
    _grammars().prepare()
    started = time.thread_time()
    _grammars().matcher(Constraint("regex", text))
    assert time.thread_time() - started < 0.4


def test_a_compilation_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_COMPILE_S", 0.0)
    with pytest.raises(InvalidRequest, match="regex: too complex: its compilation took more than 0 s of a CPU"):
        _grammars().matcher(Constraint("regex", "[0-9]{7}"))
    assert Constraint("regex", "[0-9]{7}") not in _grammars()


def test_a_mask_that_takes_too_long_is_the_texts_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a draft, it is the last draft that is followed, and the text goes on."""
    one, other = (_grammars().matcher(Constraint("regex", "[0-9]{3}")) for _ in range(2))
    draft = _ids("12")
    monkeypatch.setattr(module, "_LONGEST_MASK_S", 0.0)
    one.follow(draft[:1])
    one.masks([], 0, 1)
    assert one.fault == "too complex: a mask took more than 0 s of a CPU"
    masks = other.masks(draft, 0, 3)
    assert any(masks[1]) and not any(masks[2]) and other.fault is None
    monkeypatch.undo()
    assert not any(other.masks(draft, 1, 1)[0])
    other.follow(draft)
    assert _next(other) and other.fault is None


class _Panic(BaseException):
    pass


@pytest.mark.parametrize("error", [_Panic("index out of bounds"), RuntimeError("odd"), MemoryError()])
def test_whatever_goes_wrong_in_the_library_is_the_requests_refusal(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(constraint: Constraint) -> str:
        raise error

    monkeypatch.setattr(module, "_source", breaks)
    with pytest.raises(InvalidRequest, match=f"regex: cannot be compiled: {type(error).__name__}"):
        _grammars().matcher(Constraint("regex", "never seen"))


def test_the_tokenizer_is_read_once_and_refused_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = list[Grammars](), Grammars._read_tokenizer

    def counted(self: Grammars) -> object:
        reads.append(self)
        return read(self)

    monkeypatch.setattr(Grammars, "_read_tokenizer", counted)
    for directory, served in ((DEMO, True), (tmp_path, False)):
        grammars = Grammars(directory, VOCAB, EOS)
        grammars.prepare()
        for _ in range(2):
            if served:
                grammars.matcher(Constraint("json_object", ""))
            else:
                with pytest.raises(InvalidRequest, match=r"has no tokenizer\.json"):
                    grammars.matcher(Constraint("json_object", ""))
        assert reads.count(grammars) == 1
