"""Whether another draft pays, by what came of a sequence's drafts before it.

A round with a draft costs its steps and one pass that reads it, and gives a token more than were accepted. A round
without a draft is a step of `ar`: one pass, one token. So a draft pays where more is accepted than it took steps.
"""

from dataclasses import dataclass
from typing import Protocol

_WEIGHT = 0.25  # of the newest draft
_LONGEST = 64  # rounds between two drafts, where none has paid: they then cost 3 % at most


class Drafts(Protocol):
    """When a sequence drafts."""

    def ended(self, steps: int, tokens: int) -> None:
        """A draft of so many steps was read, and so much of it stands; without steps, so many tokens were written
        alone."""
        ...

    def alone(self, room: int) -> int:
        """How many tokens the context tower writes next, and tells together, of an answer that may take so many more;
        0: a draft comes."""
        ...


@dataclass(slots=True)
class Drafting:
    """Of one sequence. `gain`: tokens accepted beyond steps taken, a running mean. `rest`: rounds until the next draft.

    Only the sequence's own drafts count, so what a request costs does not depend on its company.
    """

    gain: float = 0.0
    rest: int = 0
    next_rest: int = 1

    def ended(self, steps: int, tokens: int) -> None:
        if not steps:
            return
        self.gain += _WEIGHT * (tokens - steps - self.gain)
        if self.gain >= 0:
            self.next_rest = 1
        else:
            self.rest, self.next_rest = self.next_rest, min(2 * self.next_rest, _LONGEST)

    def alone(self, room: int) -> int:
        if self.rest == 0:
            return 0
        self.rest -= 1
        return 1  # told as soon as it is there
