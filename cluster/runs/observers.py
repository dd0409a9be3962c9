"""Who hears what becomes of runs. A run tells its observers, and knows none of them."""

from cluster.runs.record import Record
from twotower.core import AnswerEvent
from twotower.errors import TwoTowerError


class Observer:
    """Hears everything and does nothing. Must not raise, nor take long: it is called between two events."""

    def refused(self, error: TwoTowerError) -> None:
        """A call ended before it was a run: something is wrong with it, or there is no room. Nothing else is heard."""

    def opened(self, record: Record) -> None:
        """The run looks for its first cell."""

    def placed(self, record: Record) -> None:
        """A cell has taken it: the last of `record.attempts`."""

    def first_event(self, record: Record, event: AnswerEvent) -> None:
        """The first block, or the scores. `event` hears of it too."""

    def event(self, record: Record, event: AnswerEvent) -> None:
        """A block has been committed, or the scores are there."""

    def handed_over(self, record: Record) -> None:
        """Its cell is to go; the one that it has just been placed on goes on with it."""

    def resumed(self, record: Record, error: TwoTowerError) -> None:
        """Its cell is gone, which is the error; it looks for another."""

    def ended(self, record: Record, error: BaseException | None) -> None:
        """The last that is heard of it. With an error: that ended it, the client's leaving too."""
