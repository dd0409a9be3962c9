"""Unambiguous names of tokens: `logprobs` of completions has names as keys."""

from collections.abc import Iterable, Sequence

from twotower.text.token_texts import Texts

_REPLACEMENT = "\ufffd"


class TokenNames:
    """A token's own text, or `token_id:` and its id, as in vLLM, if the text does not identify the token. This is so
    for half a character, a special token, and without a tokenizer.
    """

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def of(self, token_ids: Sequence[int]) -> list[str]:
        return [name for name, _ in self.told(token_ids)]

    def told(self, token_ids: Sequence[int]) -> list[tuple[str, bool]]:
        """Each name, and whether it is the token's text."""
        texts = self._texts.of(token_ids) or [""] * len(token_ids)
        return [
            (text, True) if text and _REPLACEMENT not in text else (_numbered(token), False)
            for token, text in zip(token_ids, texts, strict=True)
        ]

    def valued(self, tokens: Iterable[tuple[int, float]]) -> dict[str, float]:
        """The values by name. Among several tokens with one text, the first is named by it, the others by their ids."""
        named: dict[str, float] = {}
        values = dict(tokens)
        for (token, value), name in zip(values.items(), self.of(list(values)), strict=True):
            named[_numbered(token) if name in named else name] = value
        return named


class TokenNumbers(TokenNames):
    """Every token by its id."""

    def told(self, token_ids: Sequence[int]) -> list[tuple[str, bool]]:
        return [(_numbered(token), False) for token in token_ids]


def _numbered(token: int) -> str:
    return f"token_id:{token}"
