"""Who hears what becomes of runs. A run tells its observers, and knows none of them."""

import logging
import time

from cluster.runs.record import Record
from twotower.core import AnswerEvent
from twotower.errors import TwoTowerError, Unavailable

logger = logging.getLogger(__name__)


class Observer:
    """Hears everything and does nothing. Must not raise, nor take long: it is called between two events."""

    def opened(self, record: Record) -> None:
        """The run looks for its first cell."""

    def placed(self, record: Record) -> None:
        """A cell has taken it: the last of `record.attempts`."""

    def first_event(self, record: Record, event: AnswerEvent) -> None:
        """The first block, or the scores. `event` hears of it too."""

    def event(self, record: Record, event: AnswerEvent) -> None:
        """A block has been committed, or the scores are there."""

    def resumed(self, record: Record, error: TwoTowerError) -> None:
        """Its cell is gone, which is the error; it looks for another."""

    def ended(self, record: Record, error: BaseException | None) -> None:
        """The last that is heard of it. With an error: that ended it, the client's leaving too."""


class LogLines(Observer):
    """A line for each run that was resumed, or that no cell could finish; each run's end at debug level."""

    def __init__(self) -> None:
        self._opened: dict[str, float] = {}

    def opened(self, record: Record) -> None:
        self._opened[record.request.id] = time.monotonic()

    def resumed(self, record: Record, error: TwoTowerError) -> None:
        cell = record.attempts[-1]
        logger.warning("run %s goes on after %d tokens: cell %s: %s", record.name, len(record.committed), cell, error)

    def ended(self, record: Record, error: BaseException | None) -> None:
        seconds = time.monotonic() - self._opened.pop(record.request.id)
        level = logging.WARNING if isinstance(error, Unavailable) else logging.DEBUG
        outcome = "finished" if error is None else f"ended with {type(error).__name__}: {error}"
        tokens, cells = len(record.committed), len(record.attempts)
        logger.log(level, "run %s %s after %.3f s, %d tokens, %d cells", record.name, outcome, seconds, tokens, cells)
