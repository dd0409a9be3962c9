"""The denoiser engine's interface to a mode. A mode knows blocks and passes. It knows no queue, link or deadline.

A round of a sequence: the engine launches steps while the sequence is ready, and takes a turn from each step. A turn
may commit tokens. Then the sequence waits until the mirror holds them, and the engine passes the delta to the mode
(`answered`). That call gives a turn, too: if the context tower decides, it has the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from twotower.core import Likelihood, Request, TraceEvent
from twotower.decoding.certain_prefix import CertainPrefix
from twotower.engine.answer import Answer, Cost
from twotower.engine.modes.drafting import Drafting, Drafts
from twotower.engine.modes.unrated import Unrated
from twotower.engine.steps import Step
from twotower.exchange.protocol import Delta, Verifying

_NOTHING_TOLD = Cost()


@dataclass(frozen=True, slots=True)
class Turn:
    """The decision for one sequence.

    `tokens`: the answer's next tokens, at this `cost`. `commit`: tokens for the context tower to read, unless the
    answer ends with `tokens`; `alone`: how many tokens it writes after these. `finite`: the logits hold no NaN and no
    infinity; if False, the rest is undefined. `trace`: the events of a trace, if the request asks for one.
    `likelihoods`: those of the tokens, if the request asks and the context tower decided them. `confidence`: with which
    each token was fixed.
    """

    margin: float = 1.0
    tokens: Sequence[int] = ()
    cost: Cost = _NOTHING_TOLD
    commit: Sequence[int] = ()
    finite: bool = True
    trace: TraceEvent | None = None
    alone: int = 0
    likelihoods: Sequence[Likelihood] = ()
    confidence: Sequence[float] = ()


NOTHING = Turn()
NOT_FINITE = Turn(finite=False)


@dataclass(slots=True)
class LedSequence:
    """A request being decoded here.

    `ready`: the mirror holds all that has been committed, `length` positions, so the sequence can step. Its mode owns
    `tokens`, `masked`, `step` and `block`: the block that it steps on. `drafted`, also its mode's: how many of the
    block's tokens wait for the context tower's verdict. `drafting`: the rule for drafts. `alone`: how many tokens the
    context tower writes after the last commit. `known`: how many of the block's first tokens are in the answer already.
    `unrated`: set if tokens are emitted only once the context tower has rated them. `confidence`: then, the confidence
    of the block's fixed positions. `certain`: the certain prefix, if the request has a grammar and the denoiser decides
    several tokens at a time.
    """

    answer: Answer
    number: int
    mode: "DenoiserMode"
    slot: int = -1
    length: int = 0
    ready: bool = False
    closing: bool = False
    tokens: list[int] = field(default_factory=list)
    masked: list[bool] = field(default_factory=list)
    step: int = 0
    block: int = 0
    drafted: int = 0
    drafting: Drafts = field(default_factory=Drafting)
    alone: int = 0
    known: int = 0
    unrated: Unrated | None = None
    confidence: dict[int, float] = field(default_factory=dict)
    certain: CertainPrefix | None = None

    @property
    def request(self) -> Request:
        return self.answer.request


Turns = list[tuple[LedSequence, Turn]]


class DenoiserMode(Protocol):
    """How the sequences of one mode are decoded. One object serves all of them.

    `commits_first`: a sequence's tokens are committed before the step on them, so that both towers read them at the
    same time. Their delta must then wait for the step's end.
    """

    commits_first: bool

    def prompt(self, request: Request) -> tuple[int, ...]:
        """The tokens that the context tower reads before the first step."""
        ...

    def verifying(self, request: Request) -> Verifying | None:
        """How the context tower decides the tokens; None where the denoiser does."""
        return None

    def open(self, sequence: LedSequence) -> None:
        """The block that a new sequence steps on."""
        ...

    def launch(self, sequences: list[LedSequence]) -> list[Step[Turns]]:
        """Launch a step of each sequence, in as many forwards as needed. Does not wait for the device."""
        ...

    def answered(self, sequence: LedSequence, delta: Delta) -> Turn:
        """The context tower has read a part of the prompt, or a commit; the mirror has grown."""
        return NOTHING
