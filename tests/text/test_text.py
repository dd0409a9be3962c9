"""Text as it grows: equal to the whole text decoded at once, never taken back, cut at stop strings, linear in cost."""

import json
import shutil
from collections.abc import Sequence
from functools import cache
from itertools import chain, pairwise, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import twotower
from tests.cluster.fakes import ByteTokenizer
from tests.goldens import VENDORED
from tests.text.tokenizers_for_tests import SPECIAL, Plain, byte_level, metaspace, save, sentencepiece
from twotower.errors import CheckpointError, InvalidRequest
from twotower.text.answer_text import AnswerText, TextStream
from twotower.text.tokenizer import Tokenizer, around_text, check_stop, encode_prompt, load_tokenizer, require_tokenizer

DEMO = Path(twotower.__file__).parent / "demo" / "checkpoint"
TOKENIZERS = {"byte_level": cache(byte_level), "metaspace": cache(metaspace), "sentencepiece": cache(sentencepiece)}
FAST = settings(deadline=None, derandomize=True, max_examples=100)


@cache
def _demo() -> Tokenizer:
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer is not None
    return tokenizer


def _plain(name: str = "byte_level") -> Plain:
    return Plain(TOKENIZERS[name]())


def _split(ids: Sequence[int], cuts: Sequence[int]) -> list[list[int]]:
    edges = [0, *sorted({cut % (len(ids) + 1) for cut in cuts}), len(ids)]
    return [list(ids[a:b]) for a, b in pairwise(edges)]


def _streamed(tokenizer: Plain, blocks: list[list[int]], stop: Sequence[str] = ()) -> tuple[str, TextStream]:
    stream, out = TextStream(tokenizer, stop), ""
    for block in blocks:
        out += stream.push(block)
        assert stream.text.startswith(out), "text was taken back"
    return out + stream.push((), last=True), stream


CUTS = st.lists(st.integers(0, 400), max_size=30)
ANY_TEXT = st.text(st.sampled_from("ab 日本🦊é\u0301\n.Ж"), max_size=60)


@pytest.mark.parametrize("name", TOKENIZERS)
@FAST
@given(ANY_TEXT, CUTS)
def test_of_encoded_text(name: str, text: str, cuts: list[int]) -> None:
    tokenizer = _plain(name)
    ids = tokenizer.encode(text)
    out, stream = _streamed(tokenizer, _split(ids, cuts))
    assert out == stream.text == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "name", ["byte_level", "metaspace"]
)  # byte fallback takes whole characters back for a bad byte
@FAST
@given(st.lists(st.integers(0, 119), max_size=80), CUTS)
def test_of_any_tokens(name: str, ids: list[int], cuts: list[int]) -> None:
    """What a model may say: special tokens in between, and bytes that are no UTF-8."""
    tokenizer = _plain(name)
    out, stream = _streamed(tokenizer, _split(ids, cuts))
    assert out == stream.text == tokenizer.decode(ids)


@FAST
@given(ANY_TEXT, CUTS, st.lists(st.text(st.sampled_from("ab 日."), min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings(text: str, cuts: list[int], stop: list[str]) -> None:
    tokenizer = _plain()
    ids = tokenizer.encode(text)
    out, stream = _streamed(tokenizer, _split(ids, cuts), stop)
    assert out == stream.text
    whole = tokenizer.decode(ids)
    if not any(s in whole for s in stop):
        assert not stream.stopped and out == whole
        return
    assert stream.stopped
    assert whole.startswith(out) and any(whole.startswith(s, len(out)) for s in stop)
    one_by_one, _ = _streamed(tokenizer, [[token] for token in ids], stop)
    earliest = min(whole.index(s) + len(s) for s in stop if s in whole)
    assert len(one_by_one) < earliest and whole.startswith(one_by_one)


@pytest.mark.parametrize("text", ["\ufffd\ufffd日本", "\n\ufffd\ufffd\U0001f98a\n", "\ufffd" * 9 + "é日"])
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_the_replacement_character_itself(name: str, text: str) -> None:
    """It is three bytes that are no broken ones, but look so."""
    tokenizer = _plain(name)
    out, stream = _streamed(tokenizer, [[token] for token in tokenizer.encode(text)])
    assert out == stream.text == text


def test_half_a_character_is_held_back() -> None:
    tokenizer = _plain()
    ids = tokenizer.encode("a🐙b")
    assert len(ids) == 5
    stream = TextStream(tokenizer)
    assert [stream.push([token]) for token in ids] == ["a", "", "", "🐙", "b"]
    stream = TextStream(tokenizer)
    assert stream.push(ids[:3]) == "a"
    assert stream.push((), last=True) == "\ufffd"


def test_a_stop_string_across_blocks_never_shows() -> None:
    tokenizer = _plain()
    stream = TextStream(tokenizer, ["Stop!"])
    shown = [stream.push(tokenizer.encode(part)) for part in ("go. St", "o", "p", "! and on")]
    assert shown == ["go. ", "", "", ""]
    assert stream.stopped and stream.text == "go. "
    assert stream.push(tokenizer.encode("more")) == "" and stream.text == "go. "


def test_a_beginning_that_was_none_comes_out() -> None:
    tokenizer = _plain()
    stream = TextStream(tokenizer, ["Stop!", "p?"])
    assert [stream.push(tokenizer.encode(part)) for part in ("St", "op", "s", "p")] == ["", "", "Stops", ""]
    assert stream.push((), last=True) == "p"


def test_of_several_stop_strings_the_earliest_counts() -> None:
    tokenizer = _plain()
    out, stream = _streamed(tokenizer, [tokenizer.encode("one two three")], ["three", "two"])
    assert out == stream.text == "one "


@pytest.mark.parametrize("block", [1, 16])
def test_the_cost_is_linear(block: int) -> None:
    costs = []
    for repeats in (20, 80):
        tokenizer = _plain()
        ids = tokenizer.encode("日本語 text 🦊 and so on. " * repeats)
        tokenizer.decoded = 0
        _streamed(tokenizer, [ids[i : i + block] for i in range(0, len(ids), block)], ["never"])
        costs.append(tokenizer.decoded / len(ids))
    assert costs[1] < 1.1 * costs[0] and costs[1] < 12


@FAST
@given(st.data(), CUTS)
def test_of_bytes_and_special_tokens(data: st.DataObject, cuts: list[int]) -> None:
    """Characters that are cut, broken, and interrupted by tokens that say nothing: as decoded all at once."""
    tokenizer = _plain()
    pieces = [[token] for token in range(len(SPECIAL))]
    pieces += [tokenizer.encode(c)[:n] for c in "a日🦊é" for n in range(1, 5)]
    pieces += [tokenizer.encode(c)[n:] for c in "日🦊é" for n in range(1, 4)]
    ids = list(chain(*data.draw(st.lists(st.sampled_from(pieces), max_size=60))))
    out, stream = _streamed(tokenizer, _split(ids, cuts))
    assert out == stream.text == tokenizer.decode(ids)


@FAST
@given(st.text(st.sampled_from("ab:=\n é日🦊"), max_size=60), CUTS)
def test_of_the_demo_s_tokenizer(text: str, cuts: list[int]) -> None:
    tokenizer = _demo()
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, _split(ids, cuts)), stream.push((), last=True)]) == tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    (
        "name",
        "first",
    ),  # byte fallback, all at once, takes back a fox of bytes before a broken one
    [*product(TOKENIZERS, ["", "so "]), ("byte_level", "\U0001f98a")],
)
def test_text_that_never_settles_is_settled(name: str, first: str) -> None:
    """Special tokens without end, bytes that are no UTF-8 without end: each push decodes a bounded window."""
    tokenizer = _plain(name)
    begin = tokenizer.encode(first)
    broken = next((t for t in range(4, 260) if tokenizer.decode([t]) == "\ufffd"), 2)
    for endless in (2, broken):
        tokenizer.decoded = 0
        out, stream = _streamed(tokenizer, [begin, *([endless] for _ in range(2000))])
        assert out == stream.text == tokenizer.decode([*begin, *[endless] * 2000])
        assert tokenizer.decoded < 100 * 2000


def test_half_a_character_waits_for_the_rest_through_special_tokens() -> None:
    tokenizer = _plain()
    first, *rest = tokenizer.encode("\U0001f419")
    stream = TextStream(tokenizer)
    assert "".join(stream.push([token]) for token in (first, *[2] * 50, *rest)) == "\U0001f419"


def test_half_a_character_is_no_stop_string() -> None:
    tokenizer = _plain()
    ids = tokenizer.encode("a\U0001f419b")
    stream = TextStream(tokenizer, ["\ufffd"])
    assert "".join(stream.push([token]) for token in ids) == "a\U0001f419b" and not stream.stopped
    stream.push(ids[1:2])
    assert stream.push(ids[-1:]) == "" and stream.stopped


def test_no_tokenizer() -> None:
    assert load_tokenizer(VENDORED / "tt_moe") is None
    with pytest.raises(InvalidRequest, match=r"prompt: got text, but .* has no tokenizer; wanted token ids"):
        require_tokenizer(None, "prompt")
    with pytest.raises(InvalidRequest, match="has no tokenizer"):
        encode_prompt(None, "hello", 9)


def test_a_directory_with_one(tmp_path: Path) -> None:
    shutil.copy(VENDORED / "tt_moe" / "config.json", tmp_path)
    inner = byte_level()
    save(inner, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    ids = tokenizer.encode("stop. 🐙")
    assert ids == inner.encode("stop. 🐙").ids
    assert tokenizer.decode([1, *ids, 2]) == "stop. 🐙"
    assert encode_prompt(tokenizer, "", 9) == []


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("odd", [{"layer_norm_epsilon": 1}, {"use_cache": 1}, {"hidden_size": None}, {"model_type": 7}])
def test_the_model_s_config_has_no_say(odd: dict[str, object], named: bool, tmp_path: Path) -> None:
    """Values that transformers' own reader of config.json refuses."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(DEMO / name, tmp_path)
    _change(tmp_path / "config.json", odd)
    _change(tmp_path / "tokenizer_config.json", {} if named else {"tokenizer_class": None})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("words: 65\n") == _demo().encode("words: 65\n")


def _change(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_prompt_that_cannot_fit_is_not_tokenized() -> None:
    tokenizer = _plain()
    most = tokenizer.bytes_per_token * 2
    assert encode_prompt(tokenizer, "x" * most, 2) == tokenizer.encode("x" * most)
    tokenizer.encode = lambda text: pytest.fail("tokenized")  # type: ignore[method-assign]
    for text in ("x" * (most + 1), "é" * (most // 2 + 1)):
        with pytest.raises(InvalidRequest, match=rf"prompt: got \d+ bytes of text, wanted at most {most}: 2 tok"):
            encode_prompt(tokenizer, text, 2)


@pytest.mark.parametrize("content", ["{", "", "[]", '{"model": 3}'])
def test_a_damaged_tokenizer(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot load the tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_what_continues_a_prompt_has_no_special_tokens() -> None:
    """The demo's tokenizer puts a BOS in front of a prompt."""
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer is not None
    bos, *prompt = tokenizer.encode("words: 65\n")
    assert bos == 1 and tokenizer.encode_continuation("words: 65\n") == prompt
    for name in TOKENIZERS:
        assert _plain(name).encode_continuation("lazy") == _plain(name).encode("lazy")


class Ended(ByteTokenizer):
    """With an EOS behind the text, too."""

    def encode(self, text: str) -> list[int]:
        return [*super().encode(text), 2]

    def encode_continuation(self, text: str) -> list[int]:
        return self.encode(text)[1:-1]


def test_what_is_put_around_a_prompts_text() -> None:
    assert around_text(_demo()) == ([_demo().described["bos_token"]], [])
    assert around_text(Ended()) == (["<s>"], ["</s>"])


@pytest.mark.parametrize("text", ["\ud800", "caf\udce9", 7, None, ["a"]])
def test_prompts_that_are_no_text(text: object) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt: got .*, wanted"):
        encode_prompt(_plain(), text, 9)


@FAST
@given(ANY_TEXT, CUTS, st.lists(st.text(st.sampled_from("ab 日."), min_size=1, max_size=4), max_size=3))
def test_an_answer_does_not_depend_on_its_blocks(text: str, cuts: list[int], stop: list[str]) -> None:
    """The tokens end with the one that completes a stop string, however they came."""
    tokenizer = _plain()
    ids = tokenizer.encode(text)
    answer, taken, new = AnswerText(tokenizer, stop), list[int](), ""
    blocks = _split(ids, cuts)
    for number, block in enumerate(blocks):
        tokens, part = answer.push(block, last=number == len(blocks) - 1)
        taken, new = [*taken, *tokens], new + part
    complete = [n for n in range(len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in stop)]
    assert answer.stopped == bool(complete)
    assert taken == answer.token_ids == ids[: complete[0] if complete else len(ids)]
    assert new == answer.text and not any(s in new for s in stop)
    assert tokenizer.decode(taken).startswith(new)


@pytest.mark.parametrize(
    ("least", "taken", "text"),
    [
        (0, 3, ""),
        (3, 3, ""),
        (4, 5, "ab"),  # the end of one that did not count begins the next
        (5, 5, "ab"),
        (6, 9, "ababac"),
        (9, 9, "ababac"),
        (10, 10, "ababacabab"),
    ],
)
def test_no_stop_string_ends_an_answer_before_so_many_tokens(least: int, taken: int, text: str) -> None:
    """Of "aba" in "ababacabab", a character a token."""
    tokenizer = ByteTokenizer()
    answer = AnswerText(tokenizer, ["aba"], min_tokens=least)
    answer.push(tokenizer.encode_continuation("ababacabab"), last=True)
    assert (len(answer.token_ids), answer.text) == (taken, text)


def test_an_answer_without_a_tokenizer_is_its_tokens() -> None:
    answer = AnswerText(None)
    assert answer.push([5, 6], last=True) == ((5, 6), "") and answer.text is None and not answer.stopped


def test_stop_strings_need_a_tokenizer() -> None:
    assert check_stop(None, []) == () and check_stop(_plain(), "x") == ("x",)
    with pytest.raises(InvalidRequest, match="stop: got text, but this checkpoint has no tokenizer"):
        check_stop(None, "x")


@pytest.mark.parametrize("name", TOKENIZERS)
@FAST
@given(ANY_TEXT, CUTS)
@pytest.mark.slow
def test_offsets_are_where_tokens_begin(name: str, text: str, cuts: list[int]) -> None:
    """Text and tokens are the same as without; a character of several tokens begins where the first of them does."""
    tokenizer = _plain(name)
    ids = tokenizer.encode(text)
    bare, told = AnswerText(tokenizer), AnswerText(tokenizer, with_offsets=True)
    for block in _split(ids, cuts):
        bare.push(block)
        told.push(block)
    bare.push((), last=True)
    told.push((), last=True)
    assert (told.text, told.token_ids, bare.offsets) == (bare.text, bare.token_ids, [])
    assert len(told.offsets) == len(ids) and told.offsets == sorted(told.offsets)
    for place, offset in enumerate(told.offsets):
        whole = tokenizer.decode(ids[:place])
        if told.text is not None and "\ufffd" not in whole and told.text.startswith(whole):
            assert offset == len(whole)


def test_offsets_do_not_know_of_a_stop_string() -> None:
    text = AnswerText(_demo(), ["thousand"], with_offsets=True)
    taken, _ = text.push(_demo().encode_continuation("two thousand and nine"), last=True)
    assert text.text == "two " and len(text.offsets) == len(taken)
    assert text.offsets[-1] >= 3
