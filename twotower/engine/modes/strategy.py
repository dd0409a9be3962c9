"""What the denoiser engine asks of a mode. A mode knows blocks and passes. It knows no queue, link or deadline.

A round of a sequence: the engine launches steps while the sequence is ready and takes a turn from each. A turn may
commit tokens; then the sequence waits until the mirror holds them, and the mode hears of the delta (`answered`). That
is a turn, too: a mode in which the context tower decides tells its tokens there.
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
    """What was decided for one sequence.

    `tokens`: the answer's next ones, at this `cost`. `commit`: what the context tower is to read, unless the answer
    ends with `tokens`; `alone`: how many tokens it writes behind that. `finite`: the logits hold no NaN and no
    infinity; otherwise nothing else counts. `trace`: what is told of how it was decided, where the request asks; so are
    the tokens' `likelihoods`, where the context tower has decided them, and the `confidence` with which each was fixed.
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

    `ready`: the mirror holds all that has been committed, `length` positions, so the sequence can step.
    `tokens`, `masked`, `step` and `block` are its mode's: the block that it steps on. `drafted`: its mode's, too: how
    many tokens of the block wait for the context tower's verdict. `drafting`: when it drafts. `alone`: how many tokens
    the context tower writes behind what was committed last. `known`: how many of the block's first are in the answer
    already. `unrated`: where tokens are told once the context tower has read and rated them. `confidence`: of the
    block's fixed places then, as its mode keeps it. `certain`: the block's first tokens, where a grammar has to take
    each and the denoiser decides several at a time.
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

    `commits_first`: the tokens that a sequence steps on are committed before the step, so that both towers read them at
    the same time. Their delta must then wait for the step's end.
    """

    commits_first: bool

    def prompt(self, request: Request) -> tuple[int, ...]:
        """What the context tower reads before the first step."""
        ...

    def verifying(self, request: Request) -> Verifying | None:
        """How the context tower decides the tokens; None where the denoiser does."""
        return None

    def open(self, sequence: LedSequence) -> None:
        """The block that a new sequence steps on."""
        ...

    def launch(self, sequences: list[LedSequence]) -> list[Step[Turns]]:
        """A step of each of these, in as many forwards as they need. Does not wait for the device."""
        ...

    def answered(self, sequence: LedSequence, delta: Delta) -> Turn:
        """The context tower has read a part of the prompt, or a commit; the mirror has grown."""
        return NOTHING
