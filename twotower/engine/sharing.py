"""Names of prefixes, and a room in which shared prefixes count once.

Pure Python: the ledger uses it in the cell's process, the context engine in its own. Knows no tensors.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from twotower.core import AnyRequest, Request
from twotower.model.room import Held, Room


def prefix_names(tokens: Sequence[int], stride: int, salt: str | None) -> tuple[bytes, ...]:
    """A name for each prefix of 1, 2, … times `stride` tokens. Two names are equal if tokens, order and salt are.

    No names if `stride` is 0 or `salt` is None. SHA-256, because two prompts with one name would read each other's
    states.
    """
    if not stride or salt is None:
        return ()
    names, name = [], sha256(salt.encode()).digest()
    for end in range(stride, len(tokens) + 1, stride):
        name = sha256(name + array("q", tokens[end - stride : end]).tobytes()).digest()
        names.append(name)
    return tuple(names)


def shared_names(request: AnyRequest, stride: int) -> tuple[bytes, ...]:
    """The prefixes that a request may share with others: those after which it still reads tokens.

    The last token of a prompt is always read, and so is the token before the first scored one: their logits are needed.
    In `mock_ar` the denoiser reads the newest token first, so two tokens are left.
    """
    if isinstance(request, Request):
        return prefix_names(request.history[:-2], stride, request.cache_salt)
    return prefix_names(request.token_ids[: request.start - 1], stride, request.cache_salt)


@dataclass(slots=True)
class _Common:
    """The pages of one stride, and how many sequences use them."""

    pages: tuple[int, ...]
    sequences: int = 0


class HeldInCommon(NamedTuple):
    """The room of a sequence, and the names of prefixes that others may share with it."""

    held: Held
    names: tuple[bytes, ...]


class SharedRoom:
    """A room in which equal prefixes of `stride` tokens and its multiples count once.

    Its answers depend on the sequences in the room, not on the order of their arrival. So if one of two accounts of a
    cache learns of an end later, it never reports less in use than the other.
    """

    def __init__(self, room: Room, stride: int) -> None:
        self.room = room
        self._pages_each = stride // room.page_tokens
        self._common: dict[bytes, _Common] = {}

    def fits(self, positions: int, names: Sequence[bytes] = ()) -> bool:
        """Whether one more sequence would fit. `names`: its prefixes, the shortest first."""
        return self.room.fits(positions, self._shared(names))

    def take(self, positions: int, names: Sequence[bytes] = ()) -> HeldInCommon:
        """Raises Overloaded without enough room."""
        held = self.room.take(positions, self._shared(names))
        for number, name in enumerate(names):
            start = number * self._pages_each
            common = self._common.setdefault(name, _Common(held.pages[start : start + self._pages_each]))
            common.sequences += 1
        return HeldInCommon(held, tuple(names))

    def give(self, taken: HeldInCommon) -> None:
        """The sequence has ended."""
        for name in taken.names:
            self._common[name].sequences -= 1
            if not self._common[name].sequences:
                del self._common[name]
        self.room.give(taken.held)

    def _shared(self, names: Sequence[bytes]) -> list[int]:
        """A holder of a prefix also holds its shorter prefixes, so the first missing name ends the search."""
        shared: list[int] = []
        for name in names:
            common = self._common.get(name)
            if common is None:
                break
            shared += common.pages
        return shared
