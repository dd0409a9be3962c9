"""Committed tokens that wait for their likelihoods: the context tower finds them as it reads the tokens."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from twotower.core import BlockEvent, Likelihood
from twotower.errors import TwoTowerError
from twotower.exchange.protocol import Delta


@dataclass(slots=True)
class Unrated:
    """Of one sequence, whose answer's first token has the position `answer_start`. `error`: with what the answer ends
    once all of them are told, where there is no way on behind them."""

    answer_start: int
    error: TwoTowerError | None = None
    _events: deque[tuple[BlockEvent, Sequence[float]]] = field(default_factory=deque)

    @property
    def waits(self) -> bool:
        """Whether there are any."""
        return bool(self._events)

    @property
    def last_words(self) -> tuple[int, ...]:
        """The tokens with which the answer ends, where they are known; nothing is decided any more then."""
        event = self._events[-1][0] if self._events else None
        return event.token_ids if event is not None and event.is_last else ()

    def add(self, event: BlockEvent, confidence: Sequence[float]) -> None:
        """`confidence`: of each token when it was fixed, where there is such a thing; of a whole block, maybe cut."""
        self._events.append((event, confidence))

    def rated(self, delta: Delta) -> BlockEvent | None:
        """The event whose tokens have been read, as it is to be told; None where it was the prompt that was read."""
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
