"""The room of one cache: its slots and pages, which of them are free, and which a sequence holds.

Only this class counts slots and pages. A cache allocates with it; the ledger, in the cell's process, has one for each
cache and admits with it. Pure Python; knows no tensors and no requests.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from twotower.errors import Overloaded
from twotower.model.pages import PAGE_TOKENS, pages_for


class Held(NamedTuple):
    """The room of one sequence: its slot, and its pages in the order of its positions."""

    slot: int
    pages: tuple[int, ...]


class Room:
    """`slots` and `pages` in all. A sequence gets all it may ever need or nothing. `first_page`: the pages' numbers
    begin with it. `page_tokens`: positions that a page holds.

    Several sequences may hold one page. A page may also be *kept*, whether a sequence holds it or not. A kept page that
    no sequence holds counts as free: when pages are needed, `reclaim(pages)` has to `drop` so many.
    """

    def __init__(self, slots: int, pages: int, first_page: int = 0, page_tokens: int = PAGE_TOKENS) -> None:
        self.slots, self.pages, self.page_tokens = slots, pages, page_tokens
        self.reclaim: Callable[[int], None] = lambda pages: None
        self._free_slots = list(range(slots - 1, -1, -1))
        self._free_pages = list(range(first_page + pages - 1, first_page - 1, -1))
        self._holders: dict[int, int] = {}
        self._kept: set[int] = set()
        self._idle = 0  # pages that are kept and not held

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free_pages) + self._idle

    @property
    def unused_pages(self) -> int:
        """Pages that are neither held nor kept."""
        return len(self._free_pages)

    @property
    def kept_pages(self) -> int:
        return len(self._kept)

    def pages_for(self, positions: int) -> int:
        """Pages that hold so many positions of one sequence."""
        return pages_for(positions, self.page_tokens)

    def is_idle(self, page: int) -> bool:
        """Whether a kept page would be free if it were dropped."""
        return page not in self._holders

    def fits(self, positions: int, shared: Sequence[int] = ()) -> bool:
        """Whether one more sequence, of so many positions, would get what it needs besides its `shared` pages."""
        lacking = self.pages_for(positions) - len(shared)
        return bool(self._free_slots) and lacking <= self.free_pages - sum(map(self.is_idle, shared))

    def take(self, positions: int, shared: Sequence[int] = ()) -> Held:
        """Take room for one more sequence. Its first pages are the `shared` ones, which are kept or which other
        sequences hold.

        Raises Overloaded if the other pages are not free.
        """
        wanted = self.pages_for(positions) - len(shared)
        if not self.fits(positions, shared):
            raise Overloaded(
                f"cache full: wanted 1 slot and {wanted} pages, "
                f"got {self.free_slots} slots and {self.free_pages} pages free"
            )
        self._hold(shared)
        if wanted > len(self._free_pages):
            self.reclaim(wanted - len(self._free_pages))
        own = [self._free_pages.pop() for _ in range(wanted)]
        self._hold(own)
        return Held(self._free_slots.pop(), (*shared, *own))

    def give(self, held: Held) -> None:
        """Free the room that `take` returned."""
        for page in reversed(held.pages):
            if self._holders[page] > 1:
                self._holders[page] -= 1
                continue
            del self._holders[page]
            if page in self._kept:
                self._idle += 1
            else:
                self._free_pages.append(page)
        self._free_slots.append(held.slot)

    def keep(self, pages: Iterable[int]) -> None:
        """Keep these pages beyond the sequences that hold them."""
        for page in pages:
            assert page in self._holders and page not in self._kept, "only held pages are kept, and once"
            self._kept.add(page)

    def drop(self, pages: Iterable[int]) -> None:
        """Stop keeping these pages."""
        for page in pages:
            self._kept.remove(page)
            if page not in self._holders:
                self._idle -= 1
                self._free_pages.append(page)

    def _hold(self, pages: Iterable[int]) -> None:
        for page in pages:
            holders = self._holders.get(page, 0)
            self._idle -= not holders and page in self._kept
            self._holders[page] = holders + 1
