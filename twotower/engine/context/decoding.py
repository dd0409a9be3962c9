"""Writes tokens with the context tower's head, a token for each row of a forward. Rows are `ar` requests, and sequences
whose denoiser lets the context tower write.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from twotower.core import Event, Likelihood, Request
from twotower.decoding.likelihoods import beside, likelihood_of
from twotower.decoding.sampling import decide
from twotower.decoding.steering import Matcher
from twotower.engine.answer import Answer
from twotower.engine.context.sequences import ReadChunk, Sequences
from twotower.engine.context.writing import Own, Writer
from twotower.engine.passes import Want
from twotower.engine.scheduler import Key, PrefillChunk
from twotower.engine.steps import Rows, Step, clock_for, take_all
from twotower.exchange.protocol import Took
from twotower.model.tower import ContextTower


class Decoding:
    """Owns the sequences of `ar` requests; their first token follows from the prompt's last chunk. Other sequences are
    here only while they write.
    """

    def __init__(self, tower: ContextTower, sequences: Sequences, emit: Callable[[Event], None]) -> None:
        self._tower, self._sequences, self._emit = tower, sequences, emit
        self._clock = clock_for(tower.device)
        self._writers: dict[Key, Writer] = {}
        self.near_ties = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._writers

    def open(self, request: Request, matcher: Matcher | None = None) -> None:
        """Raises Overloaded."""
        self._sequences.open(request.id, self, request.history, request.positions, request.cache_salt)
        answer = Answer.begun(request, self._tower.config.eos_token_id, matcher)
        self._writers[request.id] = Own(answer, self._emit, self._near_tie)

    def write(self, key: Key, token: int, writer: Writer) -> None:
        """Write the tokens after this one, for a sequence with another owner."""
        self._writers[key] = writer
        self._sequences.decode(key, token)

    def end(self, key: Key) -> None:
        """Close the sequence."""
        self._sequences.close(key)
        self._writers.pop(key).ended()

    def forget(self, key: Key) -> None:
        """Drop the sequence; its owner closes it."""
        self._writers.pop(key, None)

    def read(self, keys: Sequence[Key]) -> None:
        """Read the newest token of each of these sequences and decide the next one."""
        started = self._clock()
        logits_RLV = self._sequences.read(keys, Want.LOGITS)
        take_all([self._decide(keys, logits_RLV[:, 0], started)])

    def has_opened(self, key: Key, found: Sequence[PrefillChunk], whole: bool) -> None:
        self._writers[key].found(found[-1].end if found else 0)

    def wants_hidden(self, last: bool) -> bool:
        return last

    def has_read(self, chunks: Sequence[ReadChunk], hidden_RLD: Tensor) -> Step[None] | None:
        ends = [read for read in chunks if read.last]
        if not ends:
            return None
        hidden_RD = torch.stack([hidden_RLD[read.row, read.chunk.end - read.chunk.start - 1] for read in ends])
        return self._decide([read.chunk.key for read in ends], self._tower.logits(hidden_RD))

    def _decide(self, keys: Sequence[Key], logits_RV: Tensor, started: float | None = None) -> Step[None]:
        writers = [self._writers[key] for key in keys]
        decided_RC = decide(logits_RV, [writer.next_token for writer in writers])
        asked = {row: writer.alternatives for row, writer in enumerate(writers) if writer.alternatives is not None}
        if asked:
            decided_RC = beside(decided_RC, logits_RV, decided_RC[:, 0].long(), list(asked), max(asked.values()))
        return Step(decided_RC, partial(self._take, keys, started))

    def _take(self, keys: Sequence[Key], started: float | None, outcome: Rows) -> None:
        took = None if started is None else Took(len(keys), self._clock() - started)
        for key, (token, margin, finite, *rated) in zip(keys, outcome, strict=True):
            writer = self._writers[key]
            if not finite:
                self._sequences.doubt(key)
                writer.failed()
                self._stop(key)
            elif writer.wrote(int(token), margin, took, _likelihood(writer, rated)):
                self._stop(key)
            else:
                self._sequences.decode(key, int(token))

    def _stop(self, key: Key) -> None:
        """Own sequences end here; others return to their owner."""
        if isinstance(self._writers[key], Own):
            self.end(key)
        else:
            self._sequences.pause(key)
            self.forget(key)

    def _near_tie(self) -> None:
        self.near_ties += 1


def _likelihood(writer: Writer, rated: Sequence[float]) -> Likelihood | None:
    return None if writer.alternatives is None else likelihood_of(rated, writer.alternatives)
