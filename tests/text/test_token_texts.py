"""What a token looks like on its own."""

from collections.abc import Iterator
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


def test_a_token_that_is_known_is_looked_up_and_the_others_are_not_looked_at() -> None:
    """A vocabulary of 131,072 that is known takes milliseconds to go through, and this is asked for each token."""
    texts = TokenTexts(ByteTokenizer())

    class Known(dict[int, str]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("goes through all that is known")

        keys = __iter__  # type: ignore[assignment]

    texts._known = Known({5: "\x01"})
    assert texts.of([5, 6, 5]) == ["\x01", "\x02", "\x01"]
