"""A sequence as the context engine knows it: what it has read and what it still has to."""

from dataclasses import dataclass, field

from twotower.core import Request
from twotower.decoding.sampling import TokenParams
from twotower.decoding.stopping import Stopping
from twotower.engine.scores import ScoreSheet
from twotower.exchange.protocol import Delta


@dataclass(slots=True)
class ContextSequence:
    """`request` and `stopping` are set for an `ar` sequence, `sheet` for one that is scored, `link` and `number` for
    one that a denoiser leads. `attach_known`: how many ids a denoiser knew that attaches and has not been answered yet.
    """

    slot: int
    to_read: list[int]
    read: list[int] = field(default_factory=list)
    link: int = -1
    number: int = -1
    attach_known: int | None = None
    request: Request | None = None
    stopping: Stopping | None = None
    sheet: ScoreSheet | None = None
    generated: int = 0
    margin: float = 1.0

    @property
    def params(self) -> TokenParams:
        """Of the next token of an `ar` sequence."""
        assert self.request is not None
        return TokenParams.of(self.request.params, self.generated)

    def has_read(self, count: int) -> None:
        self.read.extend(self.to_read[:count])
        del self.to_read[:count]

    def delta(self, start: int, complete: bool) -> Delta | None:
        """What to send of it from `start` on; to one that attaches, everything at once when all of it is read."""
        missing: tuple[int, ...] = ()
        if self.attach_known is not None:
            if not complete:
                return None
            start, missing, self.attach_known = 0, tuple(self.read[self.attach_known :]), None
        return Delta(self.number, start, len(self.read), self.slot, complete, missing)
