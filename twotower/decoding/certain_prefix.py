"""Blocks under a grammar: which of their tokens are certain, and which tokens may follow these.

A grammar says which tokens may follow a known text. So it restricts one position of a block at a time: the first masked
one. Tokens that a step has fixed further right are checked once all tokens before them are certain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from twotower.config import MASK_TOKEN_ID
from twotower.decoding.steering import Matcher
from twotower.decoding.stopping import Stopping

_ONLY_THE_MASK = "only the mask token may come next, which stands for no token in diffusion"


@dataclass(frozen=True, slots=True)
class Allowed:
    """The allowed tokens at `place` of a block: a bit for each, as in a Matcher's mask."""

    place: int
    bits: bytes

    def __contains__(self, token: int) -> bool:
        return bool(self.bits[token >> 3] >> (token & 7) & 1)


class CertainPrefix:
    """The certain prefix of one sequence's block. It never shrinks, so the matcher only moves forward.

    `allowed`: the tokens that may follow it; None if any may, because the answer has ended before that place. `fault`:
    the reason once no token is allowed.
    """

    def __init__(self, matcher: Matcher, stopping: Stopping, answer: Sequence[int]) -> None:
        """`answer`: the answer so far."""
        self._matcher, self._stopping = matcher, stopping
        self._room, self._ended = 0, False
        self.allowed: Allowed | None = None
        self.fault: str | None = None
        matcher.follow(answer)

    def begin_block(self, room: int) -> None:
        """Begin a block; the answer takes at most `room` tokens of it."""
        self._room = room
        self._look(0)

    def extend(self, tokens: Sequence[int], masked: Sequence[bool]) -> int | None:
        """Extend the prefix by the fixed tokens after it. Returns the place of the first token that breaks the grammar,
        if any; the prefix ends before that place.
        """
        while self.allowed is not None and self.allowed.place < len(tokens) and not masked[self.allowed.place]:
            place = self.allowed.place
            if tokens[place] not in self.allowed:
                return place
            self._matcher.follow([tokens[place]])
            self._ended = self._stopping.ends(tokens[place])
            self._look(place + 1)
        return None

    def _look(self, place: int) -> None:
        """Compute the allowed tokens at the next place; nothing after the answer's end."""
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
