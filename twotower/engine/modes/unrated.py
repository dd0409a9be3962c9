"""Committed tokens that wait for their likelihoods: the context tower finds them as it reads the tokens."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from twotower.core import BlockEvent, Likelihood
from twotower.exchange.protocol import Delta


@dataclass(slots=True)
class Unrated:
    """Of one sequence, whose answer's first token has the position `answer_start`."""

    answer_start: int
    _events: deque[tuple[BlockEvent, Sequence[float]]] = field(default_factory=deque)

    @property
    def last_words(self) -> tuple[int, ...]:
        """The tokens with which the answer ends, where they are known; nothing is decided any more then."""
        event = self._events[-1][0] if self._events else None
        return event.token_ids if event is not None and event.is_last else ()

    def add(self, event: BlockEvent, confidence: Sequence[float]) -> None:
        """`confidence`: of each token when it was fixed, where there is such a thing."""
        self._events.append((event, confidence))

    def rated(self, delta: Delta) -> Iterator[BlockEvent]:
        """Those of the events whose tokens have been read, as they are to be told."""
        first = delta.end - len(delta.likelihoods) - self.answer_start  # of the likelihoods, among the answer's tokens
        while self._events and self._events[0][0].start + self.answer_start < delta.end:
            event, confidence = self._events.popleft()
            known = delta.likelihoods[event.start - first :][: len(event.token_ids)]
            yield replace(event, likelihoods=tuple(_with_confidence(known, confidence)))


def _with_confidence(likelihoods: Sequence[Likelihood], confidence: Sequence[float]) -> Sequence[Likelihood]:
    if not confidence:
        return likelihoods
    return [one._replace(confidence=sure) for one, sure in zip(likelihoods, confidence, strict=False)]
