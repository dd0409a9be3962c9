"""What tokens are called where a name must tell which token it is: `logprobs` of completions has names for keys."""

from collections.abc import Iterable, Sequence

from twotower.text.token_texts import Texts

_REPLACEMENT = "\ufffd"


class TokenNames:
    """A token's own text, or `token_id:` and its id, as vLLM writes it, where the text does not tell which it is: for
    half a character, a special token, and without a tokenizer."""

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
        """The values by name. Of several tokens with one text, the first has it, and the others their ids."""
        named: dict[str, float] = {}
        values = dict(tokens)
        for (token, value), name in zip(values.items(), self.of(list(values)), strict=True):
            named[_numbered(token) if name in named else name] = value
        return named


def _numbered(token: int) -> str:
    return f"token_id:{token}"
