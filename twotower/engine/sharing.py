"""How prompts that begin alike are told, and room in which what they have in common counts once.

Pure Python: the ledger counts by it in the cell's process, the context engine in its own. Knows no tensors.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from twotower.core import AnyRequest, Request
from twotower.model.room import Held, Room


def prefix_names(tokens: Sequence[int], stride: int, salt: str) -> tuple[bytes, ...]:
    """A name for each prefix of 1, 2, … times `stride` tokens. Two are equal where tokens, order and salt are.

    No names where `stride` is 0. SHA-256: whoever could make two prompts of one name would read another's states.
    """
    if not stride:
        return ()
    names, name = [], sha256(salt.encode()).digest()
    for end in range(stride, len(tokens) + 1, stride):
        name = sha256(name + array("q", tokens[end - stride : end]).tobytes()).digest()
        names.append(name)
    return tuple(names)


def shared_names(request: AnyRequest, stride: int) -> tuple[bytes, ...]:
    """The prefixes of a request that it may have in common with others: those behind which it reads on.

    The last token of a prompt is always read, and so is the one in front of the first that is scored: something is
    decided from either. In `mock_ar` the denoiser reads the newest token first, so two tokens are left.
    """
    if isinstance(request, Request):
        return prefix_names(request.history[:-2], stride, request.cache_salt)
    return prefix_names(request.token_ids[: request.start - 1], stride, request.cache_salt)


@dataclass(slots=True)
class _Common:
    """The pages of one stride, and how many sequences count on them."""

    pages: tuple[int, ...]
    sequences: int = 0


class HeldInCommon(NamedTuple):
    """What a sequence holds, and the names of what others may hold with it."""

    held: Held
    names: tuple[bytes, ...]


class SharedRoom:
    """A room in which equal prefixes of `stride` tokens and its multiples count once.

    What it says depends on who is in the room, not on the order in which they came. So of two accounts of one cache the
    one that hears of an end later never says less than the other.
    """

    def __init__(self, room: Room, stride: int) -> None:
        self.room = room
        self._pages_each = stride // room.page_tokens
        self._common: dict[bytes, _Common] = {}

    def fits(self, positions: int, names: Sequence[bytes] = ()) -> bool:
        """Whether one more sequence would get what it needs. `names`: of its prefixes, the shortest first."""
        return self.room.fits(positions, self._shared(names))

    def take(self, positions: int, names: Sequence[bytes] = ()) -> HeldInCommon:
        """Raises Overloaded where there is not enough room."""
        held = self.room.take(positions, self._shared(names))
        for number, name in enumerate(names):
            start = number * self._pages_each
            common = self._common.setdefault(name, _Common(held.pages[start : start + self._pages_each]))
            common.sequences += 1
        return HeldInCommon(held, tuple(names))

    def give(self, taken: HeldInCommon) -> None:
        """It has ended."""
        for name in taken.names:
            self._common[name].sequences -= 1
            if not self._common[name].sequences:
                del self._common[name]
        self.room.give(taken.held)

    def _shared(self, names: Sequence[bytes]) -> list[int]:
        """Who holds a prefix holds all shorter ones of it, too: the first name that is missing ends the search."""
        shared: list[int] = []
        for name in names:
            common = self._common.get(name)
            if common is None:
                break
            shared += common.pages
        return shared
