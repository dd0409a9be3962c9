"""Scores given tokens: reads them as a prompt and applies the head at the scored positions."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from twotower.core import Event, FailureEvent, ReleasedEvent, ScoreRequest
from twotower.decoding.margins import NEAR_TIE
from twotower.engine.context.sequences import ReadChunk, Sequences
from twotower.engine.context.writing import not_finite
from twotower.engine.scheduler import Key, PrefillChunk
from twotower.engine.scores import ScoredRow, ScoreSheet, by_row, score_rows
from twotower.engine.steps import Rows, Step
from twotower.model.tower import ContextTower


class Scoring:
    """One event answers a request, once all of it is read."""

    def __init__(self, tower: ContextTower, sequences: Sequences, emit: Callable[[Event], None]) -> None:
        self._tower, self._sequences, self._emit = tower, sequences, emit
        self._sheets: dict[Key, ScoreSheet] = {}
        self.near_ties = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._sheets

    def open(self, request: ScoreRequest) -> None:
        """Raises Overloaded."""
        tokens, first = request.token_ids[:-1], request.start - 1
        self._sequences.open(request.id, self, tokens, request.positions, request.cache_salt, first)
        self._sheets[request.id] = ScoreSheet(request)

    def end(self, key: Key) -> None:
        sheet = self._sheets.pop(key)
        self._sequences.close(key)
        self._emit(ReleasedEvent(sheet.request.id))

    def has_opened(self, key: Key, found: Sequence[PrefillChunk], whole: bool) -> None:
        self._sheets[key].cached_tokens = found[-1].end if found else 0

    def wants_hidden(self, last: bool) -> bool:
        return True

    def has_read(self, chunks: Sequence[ReadChunk], hidden_RLD: Tensor) -> Step[None] | None:
        rows = [ScoredRow.of(read.row, self._sheets[read.chunk.key], read.chunk) for read in chunks]
        if not any(row.positions for row in rows):
            return None
        return Step(score_rows(self._tower, hidden_RLD, rows), partial(self._take, rows))

    def _take(self, rows: Sequence[ScoredRow], outcome: Rows) -> None:
        for row, scores in zip(rows, by_row(outcome, rows), strict=True):
            request_id = row.sheet.request.id
            if not all(token.finite for token in scores):
                self._sequences.doubt(request_id)
                self._emit(FailureEvent(request_id, not_finite(request_id)))
                self.end(request_id)
                continue
            row.sheet.add(scores)
            self.near_ties += sum(token.margin < NEAR_TIE for token in scores)
            if not self._sequences[request_id].to_read:
                self._emit(row.sheet.event())
                self.end(request_id)
