"""The text of a single token, for display; `twotower.text.answer_text` makes the text of an answer."""

from collections.abc import Sequence
from typing import Protocol

from twotower.text.tokenizer import Tokenizer


class Texts(Protocol):
    """Gives tokens' texts for display."""

    def of(self, token_ids: Sequence[int]) -> list[str]:
        """One text for each token; none at all without a tokenizer."""
        ...


class TokenTexts:
    """Each token's text as after other tokens, with its space. Half a character is U+FFFD, a special token is empty."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, token_ids: Sequence[int]) -> list[str]:
        """One text for each token; none at all without a tokenizer."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            return []
        for token in token_ids:
            if token not in self._known:  # a difference of sets would look at all that is known
                self._known[token] = _text(tokenizer, token)
        return [self._known[token] for token in token_ids]


def _text(tokenizer: Tokenizer, token: int) -> str:
    before = tokenizer.encode_continuation("a")
    whole, said = tokenizer.decode([*before, token]), tokenizer.decode(before)
    return whole.removeprefix(said) if whole.startswith(said) else tokenizer.decode([token])
