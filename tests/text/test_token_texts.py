"""What a token looks like on its own."""

from pathlib import Path

import twotower
from tests.cluster.fakes import ByteTokenizer, tokens
from twotower.text.token_texts import TokenTexts
from twotower.text.tokenizer import load_tokenizer


def test_each_token_has_a_text_and_half_a_character_shows_as_such() -> None:
    texts = TokenTexts(ByteTokenizer())
    assert texts.of(tokens("a bé")) == ["a", " ", "b", "\ufffd", "\ufffd"]
    assert texts.of([1, 2, 4 + ord("x")]) == ["", "", "x"]
    assert TokenTexts(None).of([5, 6]) == []


def test_the_demo_checkpoints_tokens_keep_their_spaces() -> None:
    tokenizer = load_tokenizer(Path(twotower.__file__).parent / "demo" / "checkpoint")
    assert tokenizer is not None
    text = "two thousand and nine"
    assert "".join(TokenTexts(tokenizer).of(tokenizer.encode_continuation(text))) == text
