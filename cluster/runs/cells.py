"""The cells as a run sees them."""

from collections.abc import Set
from typing import Protocol

from twotower.core import AnswerEvent, AnyRequest


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

    async def next(self) -> AnswerEvent:
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

        Raises Unavailable where no cell takes it now.
        """
        ...

    def elsewhere(self, avoid: Set[str]) -> bool:
        """Whether there is a living cell beside these."""
        ...

    async def ready(self) -> bool:
        """Whether a cell answers."""
        ...
