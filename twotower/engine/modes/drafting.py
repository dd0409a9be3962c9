"""Whether another draft pays, by the results of a sequence's earlier drafts.

A round with a draft costs its steps and one pass that reads it, and gives a token more than were accepted. A round
without a draft is a step of `ar`: one pass, one token. So a draft pays if it has more accepted tokens than steps.
"""

from dataclasses import dataclass
from typing import Protocol

_WEIGHT = 0.25  # of the newest draft
_LONGEST = 64  # rounds between two drafts, where none has paid: they then cost 3 % at most


class Drafts(Protocol):
    """When a sequence drafts."""

    def ended(self, steps: int, tokens: int) -> None:
        """A draft of so many steps was read, and so many of its tokens were accepted. Without steps, so many tokens
        were written alone.
        """
        ...

    def alone(self, room: int) -> int:
        """How many tokens the context tower writes next in one event, if the answer may take `room` more; 0: a draft is
        next.
        """
        ...


@dataclass(slots=True)
class Drafting:
    """The drafting rule of one sequence. `gain`: running mean of accepted tokens minus steps. `rest`: rounds until the
    next draft.

    Only the sequence's own drafts count, so a request's cost does not depend on other requests.
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
        return 1  # one token a round, emitted at once
