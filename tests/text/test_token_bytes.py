"""No prompt that would fit is refused for its bytes."""

import json
import unicodedata
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.tokenizers_for_tests import byte_level, metaspace, sentencepiece
from twotower.text.token_bytes import NORMAL_FORMS, UNKNOWN, bytes_of


@cache
def _spec(name: str) -> dict[str, Any]:
    makers = {"byte_level": byte_level, "metaspace": metaspace, "sentencepiece": sentencepiece}
    spec: dict[str, Any] = json.loads(makers[name]().to_str())
    return spec


def _longest(spec: dict[str, Any], in_bytes: bool = False) -> int:
    return max(len(token.encode() if in_bytes else token) for token in spec["model"]["vocab"])


def test_where_nothing_is_lost_it_is_the_longest_token() -> None:
    assert bytes_of(_spec("byte_level")) == _longest(_spec("byte_level"))
    assert bytes_of(_spec("sentencepiece")) == _longest(_spec("sentencepiece"), in_bytes=True)


@pytest.mark.parametrize(
    ("change", "times"),
    [
        ({"normalizer": {"type": "NFKC"}}, NORMAL_FORMS),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, UNKNOWN),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, UNKNOWN),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": " "}}, UNKNOWN),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}}, UNKNOWN),
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"}}, 1),
        ({"added_tokens": [{"content": "<mask>", "lstrip": True}]}, UNKNOWN),
        ({"added_tokens": [{"content": "<mask>", "lstrip": False}]}, 1),
    ],
)
def test_what_shortens_text_loosens_it(change: dict[str, Any], times: int) -> None:
    spec = _spec("byte_level")
    assert bytes_of(spec | change) == times * bytes_of(spec)


def test_what_leaves_text_out_loosens_it() -> None:
    """Unknown words that are one token, spaces that are none, and a byte that no token stands for."""
    assert bytes_of(_spec("metaspace")) == UNKNOWN * _longest(_spec("metaspace"), in_bytes=True)
    spec = _spec("sentencepiece")
    assert bytes_of(spec | {"pre_tokenizer": {"type": "WhitespaceSplit"}}) == UNKNOWN * bytes_of(spec)
    lost = dict(spec["model"], vocab={t: i for t, i in spec["model"]["vocab"].items() if t != "<0x0A>"})
    assert bytes_of(spec | {"model": lost}) == UNKNOWN * bytes_of(spec)
    words = {"type": "WordPiece", "unk_token": "fox", "vocab": {"fox": 0}}
    assert bytes_of({"model": words, "pre_tokenizer": {"type": "BertPreTokenizer"}}) == UNKNOWN * 3


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.text(st.sampled_from("abcdefox Ü日🦊.\n"), max_size=200))
@pytest.mark.slow
def test_no_text_has_fewer_tokens(name: str, text: str) -> None:
    made = {"byte_level": byte_level, "sentencepiece": sentencepiece}[name]
    tokenizer = cache(made)()
    assert len(text.encode()) <= len(tokenizer.encode(text).ids) * bytes_of(_spec(name))


@pytest.mark.slow
def test_no_normal_form_leaves_less_than_a_quarter() -> None:
    """Of any one character; and of any that compose to one, each written in its longest way."""
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    for form, apart in (("NFC", "NFD"), ("NFKC", "NFKD")):
        longest = {c: len(c.encode()) for c in every}
        for c in every:
            if len(alone := unicodedata.normalize(apart, c)) == 1:
                longest[alone] = max(longest[alone], len(c.encode()))
        for c in every:
            assert len(c.encode()) <= NORMAL_FORMS * len(unicodedata.normalize(apart, c).encode())
            if unicodedata.normalize(form, c) == c:
                written = sum(longest[part] for part in unicodedata.normalize("NFD", c))
                assert written <= NORMAL_FORMS * len(c.encode())
    assert all(len(c.encode()) <= NORMAL_FORMS * len(c.lower().encode()) for c in every)
