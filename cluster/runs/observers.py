"""Observers of runs. A run calls its observers and knows none of them."""

from cluster.runs.record import Record
from twotower.core import AnswerEvent
from twotower.errors import TwoTowerError


class Observer:
    """Gets all calls and does nothing. An observer must not raise or take long: it is called between two events."""

    def refused(self, error: TwoTowerError) -> None:
        """A call ended before it was a run: it is wrong, or there is no room. No other call follows."""

    def opened(self, record: Record) -> None:
        """The run begins to look for its first cell."""

    def placed(self, record: Record) -> None:
        """A cell has taken the run: the last of `record.attempts`."""

    def first_event(self, record: Record, event: AnswerEvent) -> None:
        """The first block, or the scores. `event` is called for it, too."""

    def event(self, record: Record, event: AnswerEvent) -> None:
        """A block has been committed, or the scores have arrived."""

    def handed_over(self, record: Record) -> None:
        """Its cell is being removed; the cell that it was just placed on continues it."""

    def resumed(self, record: Record, error: TwoTowerError) -> None:
        """Its cell is lost, with this error; it looks for another."""

    def ended(self, record: Record, error: BaseException | None) -> None:
        """The last call for the run. `error`: ended it, also if the client left."""
