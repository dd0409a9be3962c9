"""The cells as a run sees them."""

from collections.abc import Set
from typing import Protocol

from twotower.core import AnyRequest, Mode, ToldEvent
from twotower.errors import Unavailable


class Unfit(Unavailable):
    """This cell can never serve the request; another cell may."""

    def __init__(self, cell: str, why: str) -> None:
        super().__init__(f"cell {cell} {why}")
        self.cell = cell


class Attempt(Protocol):
    """A run's stay on the cell that has taken it."""

    @property
    def cell(self) -> str:
        """The cell's id, which is unique for ever."""
        ...

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the cell's checkpoint."""
        ...

    @property
    def vocabulary(self) -> str:
        """The vocabulary of the cell's checkpoint: equal if token ids mean the same."""
        ...

    async def next(self) -> ToldEvent:
        """The next event. Raises Overloaded if the cell has no room after all, Unavailable once the cell is lost, and
        any other error that has ended the request.
        """
        ...

    async def close(self) -> None:
        """Leave the cell. The request's work there ends."""
        ...


class Cells(Protocol):
    """The cells that decode and score: behind a Serve handle, or scripted."""

    async def place(self, request: AnyRequest, timeout_s: float, avoid: Set[str]) -> Attempt:
        """Place the request on a cell, waiting at most so many seconds; not on one of `avoid` if there is another.

        Raises Unavailable if no cell takes it now, and Unfit if the asked cell never will.
        """
        ...

    def is_to_leave(self, cell: str, request: AnyRequest, fingerprint: str) -> bool:
        """Whether the cell is being removed, and another cell with this checkpoint has room for the request."""
        ...

    def elsewhere(self, request: AnyRequest, avoid: Set[str]) -> bool:
        """Whether another living cell than these serves such a request."""
        ...

    def lacks(self, request: AnyRequest) -> bool:
        """Whether cells serve, but none serves such a request now."""
        ...

    async def served(self) -> Set[Mode]:
        """The modes that living cells serve now. A cell with `ar` serves scores."""
        ...
