"""Committed tokens that wait for their likelihoods, which the context tower computes as it reads the tokens."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from twotower.core import BlockEvent, Likelihood
from twotower.errors import TwoTowerError
from twotower.exchange.protocol import Delta


@dataclass(slots=True)
class Unrated:
    """The waiting tokens of one sequence, whose answer's first token has the position `answer_start`. `error`: ends the
    answer after these tokens, if it cannot continue.
    """

    answer_start: int
    error: TwoTowerError | None = None
    _events: deque[tuple[BlockEvent, Sequence[float]]] = field(default_factory=deque)

    @property
    def waits(self) -> bool:
        """Whether any tokens wait."""
        return bool(self._events)

    @property
    def last_words(self) -> tuple[int, ...]:
        """The last tokens of the answer, once they are known; then nothing more is decided."""
        event = self._events[-1][0] if self._events else None
        return event.token_ids if event is not None and event.is_last else ()

    def add(self, event: BlockEvent, confidence: Sequence[float]) -> None:
        """`confidence`: of each token when it was fixed, if the mode has one; for a whole block, which may be cut."""
        self._events.append((event, confidence))

    def rated(self, delta: Delta) -> BlockEvent | None:
        """The complete event whose tokens have been read; None if the prompt was read."""
        if not delta.likelihoods:
            return None
        event, confidence = self._events.popleft()
        told = (delta.end - len(delta.likelihoods), len(delta.likelihoods))
        assert told == (self.answer_start + event.start, len(event.token_ids)), (
            "what is committed is one event's tokens"
        )
        return replace(event, likelihoods=tuple(_with_confidence(delta.likelihoods, confidence)))


def _with_confidence(likelihoods: Sequence[Likelihood], confidence: Sequence[float]) -> Sequence[Likelihood]:
    if not confidence:
        return likelihoods
    return [one._replace(confidence=sure) for one, sure in zip(likelihoods, confidence, strict=False)]
