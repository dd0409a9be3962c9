"""The cells as a run sees them."""

from collections.abc import Set
from typing import Protocol

from twotower.core import AnyRequest, Mode, ToldEvent
from twotower.errors import Unavailable


class Unfit(Unavailable):
    """This cell cannot do what is asked, whenever it is asked; another may."""

    def __init__(self, cell: str, why: str) -> None:
        super().__init__(f"cell {cell} {why}")
        self.cell = cell


class Attempt(Protocol):
    """A run's stay on one cell, which has taken it."""

    @property
    def cell(self) -> str:
        """The cell's id: no other has had it or will have it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the cell's checkpoint."""
        ...

    @property
    def vocabulary(self) -> str:
        """Of the cell's checkpoint: the same where token ids mean the same."""
        ...

    async def next(self) -> ToldEvent:
        """The next event. Raises Overloaded where the cell has no room after all, Unavailable once the cell is gone,
        and whatever else has ended the request.
        """
        ...

    async def close(self) -> None:
        """Leave. What still runs on the cell ends."""
        ...


class Cells(Protocol):
    """Whatever decodes and scores: cells behind a Serve handle, or a script."""

    async def place(self, request: AnyRequest, timeout_s: float, avoid: Set[str]) -> Attempt:
        """Have a cell take the request, for so many seconds; not one of `avoid` where there is another.

        Raises Unavailable where no cell takes it now, Unfit where the one that was asked never will.
        """
        ...

    def is_to_leave(self, cell: str, request: AnyRequest, fingerprint: str) -> bool:
        """Whether the cell is to go, and another that serves this checkpoint has room for the request."""
        ...

    def elsewhere(self, request: AnyRequest, avoid: Set[str]) -> bool:
        """Whether there is a living cell beside these that serves such a request."""
        ...

    def lacks(self, request: AnyRequest) -> bool:
        """Whether cells live and serve, but none serves such a request now."""
        ...

    async def served(self) -> Set[Mode]:
        """The modes that living cells serve now. Scores are where `ar` is."""
        ...
