"""What is needed to go on with a request on any cell: nothing else that matters lives anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from twotower.core import AnyRequest, Request, RequestId
from twotower.errors import Unavailable


class Gap(Unavailable):
    """A cell's events do not follow each other."""


@dataclass(slots=True)
class Record:
    """A checked request as it was asked, seed included, and what has come of it.

    `committed`: the new tokens so far. `fingerprint`: of the checkpoint that all of them are from. `attempts`: the
    cells that have taken it, one after the other.
    """

    request: AnyRequest
    fingerprint: str
    label: str = ""
    committed: list[int] = field(default_factory=list)
    attempts: list[str] = field(default_factory=list)

    @property
    def shown_id(self) -> str:
        """What an answer is called: the client's name for it, else our id."""
        return self.label or self.request.id

    @property
    def name(self) -> str:
        """For the log."""
        return f"{self.request.id} ({self.label})" if self.label else self.request.id

    def rest(self) -> AnyRequest:
        """The request as the next cell gets it, under a name of its own: the last cell may not have let go of it yet.

        Scores are asked for again as a whole.
        """
        if not self.attempts:
            return self.request
        name = RequestId(f"{self.request.id}~{len(self.attempts)}")
        if isinstance(self.request, Request):
            return replace(self.request, id=name, committed=tuple(self.committed))
        return replace(self.request, id=name)

    def commit(self, start: int, token_ids: Sequence[int]) -> bool:
        """Take tokens that follow the others; False for those that are here already. Raises Gap for all else."""
        have = len(self.committed)
        if start == have:
            self.committed.extend(token_ids)
            return True
        if start + len(token_ids) <= have:
            return False
        raise Gap(f"got {len(token_ids)} tokens from {start} on, wanted those from {have} on")
