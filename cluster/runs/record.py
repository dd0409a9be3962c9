"""The record: all that is needed to resume a request on any cell. No other state matters."""

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
    """A cell's events do not follow the committed tokens, or contradict them."""


@dataclass(slots=True)
class Record:
    """A checked request with its seed, and its answer so far.

    `committed`: the new tokens so far. `fingerprint`: of the checkpoint that decoded all of them. `vocabulary`: of the
    checkpoint whose tokenizer made the prompt's tokens. `attempts`: the cells that have taken it, in order. `usage` and
    `finish_reason`: as last sent to the client.
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
    _diffused: bool = False  # in `auto`: its tokens are those of `diffusion`
    _asked: int = 0  # how often a cell was asked to take it
    _traced: tuple[int, float] = (0, -1)  # the last block and step that were sent

    @property
    def shown_id(self) -> str:
        """The answer's id for the client: the client's label, else our id."""
        return self.label or self.request.id

    @property
    def name(self) -> str:
        """The request's name in the log."""
        return f"{self.request.id} ({self.label})" if self.label else self.request.id

    def suits(self, fingerprint: str, vocabulary: str) -> bool:
        """Whether a cell with this checkpoint may take it; then the record keeps that checkpoint.

        A request without tokens may begin on other weights if token ids mean the same. While weights change, cells and
        routers are not replaced at the same moment.
        """
        if fingerprint != self.fingerprint and (self.committed or not vocabulary or vocabulary != self.vocabulary):
            return False
        self.fingerprint = fingerprint
        return True

    def rest(self) -> AnyRequest:
        """The request for the next cell, under a new id. The last asked cell may not have released the old one yet, and
        may also be the next cell.

        Scores are requested again as a whole. `auto` keeps its first cell's choice: the tokens of `diffusion`, or the
        context tower's.
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
        """Commit the new part of a block and return it; None if nothing is new. Raises Gap if the block does not
        follow, if it repeats different tokens, and if requested likelihoods are missing.
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
        if self._diffused:  # a resuming cell does not know that `auto` was requested
            event = replace(event, num_diffusion_blocks=event.num_blocks)
        if known == 0:
            return event
        return event.after(known) if known < len(event.token_ids) else None

    def check_rated(self, event: AnswerEvent) -> None:
        """Raises Gap if requested likelihoods are missing: a cell of an older version sends none."""
        tokens = len(event.token_ids if isinstance(event, BlockEvent) else event.log_probs)
        if self.request.logprobs is not None and len(event.likelihoods) != tokens:
            raise Gap(f"got {tokens} tokens with {len(event.likelihoods)} likelihoods, wanted one for each")

    def trace_news(self, event: TraceEvent) -> TraceEvent | None:
        """A trace event that has not been sent; None if it has.

        A cell that resumes after the last committed block begins the next block at its first step, which the earlier
        cell may have sent already.
        """
        told = (event.start, event.step if isinstance(event, StepEvent) else inf)
        if event.start < len(self.committed) or told <= self._traced:
            return None
        self._traced = told
        return event
