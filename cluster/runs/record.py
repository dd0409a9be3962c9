"""What is needed to go on with a request on any cell: nothing else that matters lives anywhere."""

from dataclasses import dataclass, field, replace
from math import inf

from cluster.runs.answer import NOTHING, Usage
from cluster.runs.callers import NOBODY, Caller
from cluster.runs.trace_parent import NO_PARENT, TraceParent
from twotower.core import (
    AnswerEvent,
    AnyRequest,
    BlockEvent,
    FinishReason,
    Mode,
    Request,
    RequestId,
    StepEvent,
    TraceEvent,
)
from twotower.errors import Unavailable


class Gap(Unavailable):
    """A cell's events do not follow what is committed, or contradict it."""


@dataclass(slots=True)
class Record:
    """A checked request as it was asked, seed included, and what has come of it.

    `committed`: the new tokens so far. `fingerprint`: of the checkpoint that all of them are from. `vocabulary`: of the
    checkpoint that the prompt's tokens are from. `attempts`: the cells that have taken it, one after the other.
    `usage` and `finish_reason`: as the client was told last.
    """

    request: AnyRequest
    fingerprint: str
    label: str = ""
    caller: Caller = NOBODY
    parent: TraceParent = NO_PARENT
    committed: list[int] = field(default_factory=list)
    attempts: list[str] = field(default_factory=list)
    usage: Usage = NOTHING
    finish_reason: FinishReason | None = None
    vocabulary: str = ""
    _diffused: bool = False  # of `auto`: its tokens are those of `diffusion`
    _asked: int = 0  # how often a cell has been asked to take it
    _traced: tuple[int, float] = (0, -1)  # the block whose step was told last, and which

    @property
    def shown_id(self) -> str:
        """What an answer is called: the client's name for it, else our id."""
        return self.label or self.request.id

    @property
    def name(self) -> str:
        """For the log."""
        return f"{self.request.id} ({self.label})" if self.label else self.request.id

    def suits(self, fingerprint: str, vocabulary: str) -> bool:
        """Whether a cell with this checkpoint may have it; then it stays with that.

        One that has no token yet may begin on other weights, if their tokens mean the same: while weights change, cells
        and routers are not replaced at the same moment.
        """
        if fingerprint != self.fingerprint and (self.committed or not vocabulary or vocabulary != self.vocabulary):
            return False
        self.fingerprint = fingerprint
        return True

    def rest(self) -> AnyRequest:
        """The request as the next cell gets it, under a name of its own: the last that was asked may not have let go of
        it yet, and may be the next too.

        Scores are asked for again as a whole. `auto` goes on with what its first cell chose: the tokens of `diffusion`,
        or the context tower's.
        """
        before, self._asked = self._asked, self._asked + 1
        if not before:
            return self.request
        name = RequestId(f"{self.request.id}~{before}")
        if isinstance(self.request, Request):
            params = self.request.params
            params = replace(params, mode=Mode.DIFFUSION) if self._diffused else params
            return replace(self.request, id=name, params=params, committed=tuple(self.committed))
        return replace(self.request, id=name)

    def news(self, event: BlockEvent) -> BlockEvent | None:
        """What of a block is not committed yet, which is from now on; None where there is nothing. Raises Gap where it
        does not follow, where it repeats other tokens than are there, and where likelihoods are asked for and missing.
        """
        self.check_rated(event)
        have, known = len(self.committed), len(self.committed) - event.start
        if (
            known < 0
            or tuple(self.committed[event.start : event.start + len(event.token_ids)]) != event.token_ids[:known]
        ):
            got = f"{len(event.token_ids)} tokens from {event.start} on"
            raise Gap(
                f"got {got}, wanted those from {have} on" if known < 0 else f"got {got} that are not those of before"
            )
        self.committed.extend(event.token_ids[known:])
        self._diffused = self._diffused or event.num_diffusion_blocks > 0
        if self._diffused:  # a cell that goes on does not know that `auto` was asked for
            event = replace(event, num_diffusion_blocks=event.num_blocks)
        if known == 0:
            return event
        return event.after(known) if known < len(event.token_ids) else None

    def check_rated(self, event: AnswerEvent) -> None:
        """Raises Gap where likelihoods are asked for and are not told: a cell of an older version tells none."""
        tokens = len(event.token_ids if isinstance(event, BlockEvent) else event.log_probs)
        if self.request.logprobs is not None and len(event.likelihoods) != tokens:
            raise Gap(f"got {tokens} tokens with {len(event.likelihoods)} likelihoods, wanted one for each")

    def trace_news(self, event: TraceEvent) -> TraceEvent | None:
        """A part of the trace that has not been told; None where it has.

        A cell that goes on from the last committed block takes the next one from its first step, which the cell before
        may have told.
        """
        told = (event.start, event.step if isinstance(event, StepEvent) else inf)
        if event.start < len(self.committed) or told <= self._traced:
            return None
        self._traced = told
        return event
