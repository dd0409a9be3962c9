"""Decodes `ar` requests: the context tower's own head decides, a token for each row of a forward."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from twotower.core import Event, FailureEvent, ReleasedEvent, Request
from twotower.decoding.likelihoods import beside, likelihood_of
from twotower.decoding.sampling import decide
from twotower.engine.answer import Answer, Cost
from twotower.engine.context.sequences import ReadChunk, Sequences
from twotower.engine.passes import Want
from twotower.engine.scheduler import Key
from twotower.engine.steps import Rows, Step, take_all
from twotower.errors import NumericalError
from twotower.model.tower import ContextTower

NOT_FINITE = "the context tower's logits hold a NaN or an infinity"


class Decoding:
    """An answer's first token follows from its prompt's last chunk."""

    def __init__(self, tower: ContextTower, sequences: Sequences, emit: Callable[[Event], None]) -> None:
        self._tower, self._sequences, self._emit = tower, sequences, emit
        self._answers: dict[Key, Answer] = {}
        self.near_ties = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._answers

    def open(self, request: Request) -> None:
        """Raises Overloaded."""
        self._sequences.open(request.id, self, request.history, request.positions)
        self._answers[request.id] = Answer.begun(request, self._tower.config.eos_token_id)

    def end(self, key: Key) -> None:
        answer = self._answers.pop(key)
        self._sequences.close(key)
        self._emit(ReleasedEvent(answer.request.id))

    def read(self, keys: Sequence[Key]) -> None:
        """The newest token of each of these, for the next one."""
        logits_RLV = self._sequences.read(keys, Want.LOGITS)
        take_all([self._decide(keys, logits_RLV[:, 0])])

    def wants_hidden(self, last: bool) -> bool:
        return last

    def has_read(self, chunks: Sequence[ReadChunk], hidden_RLD: Tensor) -> Step[None] | None:
        ends = [read for read in chunks if read.last]
        if not ends:
            return None
        hidden_RD = torch.stack([hidden_RLD[read.row, read.chunk.end - read.chunk.start - 1] for read in ends])
        return self._decide([read.chunk.key for read in ends], self._tower.logits(hidden_RD))

    def _decide(self, keys: Sequence[Key], logits_RV: Tensor) -> Step[None]:
        decided_RC = decide(logits_RV, [self._answers[key].next_token for key in keys])
        asked = {row: most for row, key in enumerate(keys) if (most := self._asked(key)) is not None}
        if asked:
            decided_RC = beside(decided_RC, logits_RV, decided_RC[:, 0].long(), list(asked), max(asked.values()))
        return Step(decided_RC, partial(self._take, keys))

    def _asked(self, key: Key) -> int | None:
        return self._answers[key].request.logprobs

    def _take(self, keys: Sequence[Key], outcome: Rows) -> None:
        for key, (token, margin, finite, *rated) in zip(keys, outcome, strict=True):
            if finite:
                self._has_token(key, int(token), margin, rated)
            else:
                request_id = self._answers[key].request.id
                self._emit(FailureEvent(request_id, not_finite(request_id)))
                self.end(key)

    def _has_token(self, key: Key, token: int, margin: float, rated: Sequence[float]) -> None:
        answer, alternatives = self._answers[key], self._asked(key)
        self.near_ties += answer.decided(margin)
        likelihoods = () if alternatives is None else [likelihood_of(rated, alternatives)]
        event = answer.extend([token], Cost(), likelihoods)
        self._emit(event)
        if event.is_last:
            self.end(key)
        else:
            self._sequences.decode(key, token)


def not_finite(request_id: str) -> NumericalError:
    return NumericalError(f"request {request_id}: {NOT_FINITE}")
