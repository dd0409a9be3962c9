"""When a device runs out of memory in a pass, the pass's rows are tried in halves or fail, and the engine goes on.

Halves are possible only if the failed pass has changed nothing. This holds for passes that only read, and for a check
of drafts until it settles. A pass that extends states may have advanced some layers, so its rows fail.

Rows fail with Overloaded: the same request may succeed later, or on another cell. Its router knows that already.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from twotower.errors import Overloaded

logger = logging.getLogger(__name__)

Row = TypeVar("Row")
Result = TypeVar("Result")


class ShortMemory:
    """The memory shortages of one engine. `times`: how often a pass found no memory."""

    def __init__(self, tower: str) -> None:
        self._tower = tower
        self.times = 0

    def tried(self, rows: int, run: Callable[[], object]) -> Overloaded | None:
        """Run a pass over so many rows. Returns the error for its rows if it found no memory."""
        try:
            run()
        except torch.OutOfMemoryError as error:
            return self._noted(rows, error)
        return None

    def in_halves(
        self,
        rows: Sequence[Row],
        run: Callable[[list[Row]], Sequence[Result]],
        fail: Callable[[Row, Overloaded], None],
    ) -> list[Result]:
        """The results of `run` over all rows. Without memory for all rows at once it runs halves, then quarters, and so
        on. A row that finds no memory alone fails.
        """
        results: list[Result] = []
        short = self.tried(len(rows), lambda: results.extend(run(list(rows))))
        if short is None:
            return results
        # The error is gone by now, and with it the frames that held what the pass had allocated.
        if len(rows) == 1:
            fail(rows[0], short)
            return []
        middle = len(rows) // 2
        return [*self.in_halves(rows[:middle], run, fail), *self.in_halves(rows[middle:], run, fail)]

    def _noted(self, rows: int, error: torch.OutOfMemoryError) -> Overloaded:
        self.times += 1
        said = str(error).partition("\n")[0]
        logger.warning("the %s tower found no memory for a pass over %d rows: %s", self._tower, rows, said)
        return Overloaded(f"the {self._tower} tower's device has no memory for a pass over {rows} rows")
