"""Matchers of tiny languages, without a tokenizer."""

from collections.abc import Sequence

EOS = 2


class Language:
    """These words, each of some tokens, and EOS behind them."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self._texts, self._said = [(*word, EOS) for word in words], tuple[int, ...]()
        self.fault: str | None = None

    def follow(self, tokens: Sequence[int]) -> None:
        self._said += tuple(tokens)

    def masks(self, draft: Sequence[int], first: int, count: int) -> list[bytes]:
        assert (draft, first, count) == ((), 0, 1), "nothing is asked of a draft in diffusion"
        at = len(self._said)
        bits = 0
        for text in self._texts:
            if text[:at] == self._said and len(text) > at:
                bits |= 1 << text[at]
        self.fault = None if bits else "dead end"
        return [bits.to_bytes(4, "little")]


class Anything:
    """Every text of every token."""

    fault: str | None = None

    def follow(self, tokens: Sequence[int]) -> None: ...

    def masks(self, draft: Sequence[int], first: int, count: int) -> list[bytes]:
        return [b"\xff" * 4]
