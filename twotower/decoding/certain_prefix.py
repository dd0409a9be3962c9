"""Blocks whose text has to be what a grammar says: which of their tokens are certain, and what may come behind those.

A grammar says which tokens may come behind a text that is known. So of a block it restricts one position at a time, the
first that is still masked. What a step has fixed further right is looked at once all in front of it is certain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from twotower.config import MASK_TOKEN_ID
from twotower.decoding.steering import Matcher
from twotower.decoding.stopping import Stopping

_ONLY_THE_MASK = "only the mask token may come next, which stands for no token in diffusion"


@dataclass(frozen=True, slots=True)
class Allowed:
    """The tokens that may come at `place` of a block: a bit for each, as a Matcher has them."""

    place: int
    bits: bytes

    def __contains__(self, token: int) -> bool:
        return bool(self.bits[token >> 3] >> (token & 7) & 1)


class CertainPrefix:
    """Of one sequence's block. Its tokens are never taken back, so the matcher follows them for good.

    `allowed`: what may come behind it; None where anything may, because the answer has ended in front of that place.
    `fault`: why no token may come, once none may.
    """

    def __init__(self, matcher: Matcher, stopping: Stopping, answer: Sequence[int]) -> None:
        """`answer`: as far as it is there."""
        self._matcher, self._stopping = matcher, stopping
        self._room, self._ended = 0, False
        self.allowed: Allowed | None = None
        self.fault: str | None = None
        matcher.follow(answer)

    def begin_block(self, room: int) -> None:
        """A block of which the answer takes `room` tokens at most."""
        self._room = room
        self._look(0)

    def extend(self, tokens: Sequence[int], masked: Sequence[bool]) -> int | None:
        """By the tokens that are fixed behind it. Returns the place of the first that breaks the grammar, if one does;
        the prefix ends in front of it."""
        while self.allowed is not None and self.allowed.place < len(tokens) and not masked[self.allowed.place]:
            place = self.allowed.place
            if tokens[place] not in self.allowed:
                return place
            self._matcher.follow([tokens[place]])
            self._ended = self._stopping.ends(tokens[place])
            self._look(place + 1)
        return None

    def _look(self, place: int) -> None:
        """What may come there. Nothing is worked out behind the answer's end."""
        if self._ended or place >= self._room:
            self.allowed = None
            return
        [bits] = self._matcher.masks((), 0, 1)
        self.fault = self._matcher.fault
        if MASK_TOKEN_ID in Allowed(place, bits):
            bits = bytes([bits[0] & ~(1 << MASK_TOKEN_ID), *bits[1:]])
            if self.fault is None and not any(bits):
                self.fault = _ONLY_THE_MASK
        self.allowed = Allowed(place, bits)
