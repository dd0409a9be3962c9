"""The room of one cache: its slots and pages, which of them are free, and what a sequence takes of them.

The one place that counts them. A cache allocates by it; the ledger, in the cell's process, has one for each cache and
admits by it. Pure Python; knows no tensors and no requests.
"""

from typing import NamedTuple

from twotower.errors import Overloaded
from twotower.model.pages import pages_for


class Held(NamedTuple):
    """What one sequence holds: its slot, and its pages in the order of its positions."""

    slot: int
    pages: tuple[int, ...]


class Room:
    """`slots` and `pages` in all. A sequence gets all it may ever need or nothing. `first_page`: the pages' numbers
    begin with it."""

    def __init__(self, slots: int, pages: int, first_page: int = 0) -> None:
        self.slots, self.pages = slots, pages
        self._free_slots = list(range(slots - 1, -1, -1))
        self._free_pages = list(range(first_page + pages - 1, first_page - 1, -1))

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def free_pages(self) -> int:
        return len(self._free_pages)

    def fits(self, positions: int) -> bool:
        """Whether one more sequence, of so many positions, would get what it needs."""
        return bool(self._free_slots) and pages_for(positions) <= len(self._free_pages)

    def take(self, positions: int) -> Held:
        """What one more sequence needs. Raises Overloaded where it is not free."""
        wanted = pages_for(positions)
        if not self.fits(positions):
            raise Overloaded(
                f"cache full: wanted 1 slot and {wanted} pages, "
                f"got {self.free_slots} slots and {self.free_pages} pages free"
            )
        return Held(self._free_slots.pop(), tuple(self._free_pages.pop() for _ in range(wanted)))

    def give(self, held: Held) -> None:
        """What `take` gave is free again."""
        self._free_pages.extend(reversed(held.pages))
        self._free_slots.append(held.slot)
