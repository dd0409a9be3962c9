"""The receivers of tokens that the context tower writes for a sequence, one at a time."""

from collections.abc import Callable, Sequence
from typing import Protocol

from twotower.core import Event, FailureEvent, Likelihood, ReleasedEvent
from twotower.decoding.sampling import TokenParams
from twotower.decoding.steering import Steered, Steering
from twotower.decoding.stopping import Stopping
from twotower.engine.answer import Answer, Cost, no_way_on
from twotower.errors import NumericalError
from twotower.exchange.protocol import Decided, Took, Verifying

NOT_FINITE = "the context tower's logits hold a NaN or an infinity"


class Writer(Protocol):
    """The receiver of one sequence's tokens. `next_token`: how its next token is chosen. `alternatives`: how many
    alternatives a token's likelihood has; None: no likelihood.
    """

    @property
    def next_token(self) -> TokenParams: ...

    @property
    def alternatives(self) -> int | None: ...

    def found(self, positions: int) -> None:
        """Called with the number of the prompt's positions that need not be read."""
        ...

    def wrote(self, token: int, margin: float, took: Took | None, likelihood: Likelihood | None) -> bool:
        """Called with the next token; returns whether it is the last for now. `took`: the forward; None for a prompt's
        token.
        """
        ...

    def failed(self) -> None:
        """Called if there is no token: its logits hold a NaN or an infinity."""
        ...

    def ended(self) -> None:
        """Called when nothing more is written and its slot is free."""
        ...


class Own:
    """The receiver of an `ar` request: each token goes into its answer."""

    def __init__(self, answer: Answer, emit: Callable[[Event], None], near_tie: Callable[[], None]) -> None:
        self._answer, self._emit, self._near_tie = answer, emit, near_tie

    @property
    def next_token(self) -> TokenParams:
        return self._answer.next_token

    @property
    def alternatives(self) -> int | None:
        return self._answer.request.logprobs

    def found(self, positions: int) -> None:
        self._answer.cached_tokens = positions

    def wrote(self, token: int, margin: float, took: Took | None, likelihood: Likelihood | None) -> bool:
        if self._answer.decided(margin):
            self._near_tie()
        event = self._answer.extend([token], Cost(), () if likelihood is None else [likelihood])
        self._emit(event)
        return event.is_last

    def failed(self) -> None:
        request_id, steering = self._answer.request.id, self._answer.steering
        self._emit(FailureEvent(request_id, no_way_on(steering) or not_finite(request_id)))

    def ended(self) -> None:
        self._emit(ReleasedEvent(self._answer.request.id))


class Alone:
    """The receiver of a sequence that a denoiser leads. It tells so many tokens together, or fewer if one ends the
    answer.

    `start` is the position of the block, whose only token is known. `alternatives`: as in a Writer. `steering`: the
    sequence's own. `tell(decided, likelihoods)`: called at the end; then the sequence waits for the denoiser again.
    """

    def __init__(
        self,
        verifying: Verifying,
        start: int,
        most: int,
        eos_token_id: int,
        alternatives: int | None,
        steering: Steering | None,
        tell: Callable[[Decided, Sequence[Likelihood]], None],
        fail: Callable[[], None],
    ) -> None:
        self._params, self._place, self._most = verifying.params, start + 1 - verifying.answer_start, most
        self._stopping = Stopping(verifying.params, eos_token_id)
        self._tell, self._fail = tell, fail
        self.alternatives, self._steering = alternatives, steering
        self._written: list[int] = []
        self._likelihoods: list[Likelihood] = []
        self._margin = 1.0

    @property
    def next_token(self) -> TokenParams:
        steered = None if self._steering is None else Steered(self._steering)
        return TokenParams.of(self._params, self._place + len(self._written), steered)

    def found(self, positions: int) -> None:
        """The deltas tell the denoiser."""

    def wrote(self, token: int, margin: float, took: Took | None, likelihood: Likelihood | None) -> bool:
        self._likelihoods += [] if likelihood is None else [likelihood]
        self._margin = min(self._margin, margin)
        if self._steering is not None:
            self._steering.follow([token])
        if len(self._written) + 1 < self._most and not self._stopping.ends(token):
            self._written.append(token)
            return False
        self._tell(Decided(token, self._margin, tuple(self._written), took), self._likelihoods)
        return True

    def failed(self) -> None:
        self._fail()

    def ended(self) -> None:
        """The denoiser continues the sequence."""


def not_finite(request_id: str) -> NumericalError:
    return NumericalError(f"request {request_id}: {NOT_FINITE}")
