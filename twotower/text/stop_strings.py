"""Finds stop strings in growing text: each character is looked at once, however the text is cut."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Found(NamedTuple):
    """The earliest stop string, and how many characters before the end of the text it begins. If several begin there,
    the shortest, which ended first.
    """

    before_end: int
    text: str


class StopSearch:
    """How much of each stop string the text so far ends with: an incremental Knuth-Morris-Pratt search."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._matched = [0] * len(self._stop)

    @property
    def begun(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        return max(self._matched, default=0)

    def push(self, piece: str) -> Found | None:
        """Continue with `piece`. Returns the stop string found now, or None."""
        self._matched, found = self._after(piece)
        return found

    def pass_over(self, piece: str) -> None:
        """Continue with `piece`, ignoring stop strings that are complete in it."""
        for place, text in enumerate(self._stop):
            count, end = _match(text, self._matched[place], rest := piece)
            while count == len(text):
                count, end = _match(text, _borders(text)[-1], rest := rest[end:])
            self._matched[place] = count

    def peek(self, piece: str) -> Found | None:
        """The result that `push` would return."""
        return self._after(piece)[1]

    def _after(self, piece: str) -> tuple[list[int], Found | None]:
        matched, found = list[int](), list[Found]()
        for text, before in zip(self._stop, self._matched, strict=True):
            count, end = _match(text, before, piece)
            matched.append(count)
            if count == len(text):
                found.append(Found(len(piece) - end + count, text))
        return matched, max(found, key=lambda one: (one.before_end, -len(one.text)), default=None)


def _match(text: str, matched: int, piece: str) -> tuple[int, int]:
    """How much of `text` is matched after `piece`, and up to which place of it was looked: to the first whole match."""
    place = 0
    while place < len(piece) and matched < len(text):
        if matched == 0:
            place = piece.find(text[0], place)
            if place < 0:
                return 0, len(piece)
        while matched and text[matched] != piece[place]:
            matched = _borders(text)[matched - 1]
        matched += text[matched] == piece[place]
        place += 1
    return matched, place


@lru_cache(maxsize=256)
def _borders(text: str) -> tuple[int, ...]:
    """For each beginning of `text`: the length of the longest shorter beginning that also ends it."""
    borders, length = [0], 0
    for place in range(1, len(text)):
        while length and text[place] != text[length]:
            length = borders[length - 1]
        length += text[place] == text[length]
        borders.append(length)
    return tuple(borders)
