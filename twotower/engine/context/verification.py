"""Verifies drafts: reads a block with logits, keeps of it what `ar` would have written, and tells the token after that.

The token after a prompt is decided here, too. Knows neither ports nor how a draft was made.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from twotower.decoding.sampling import TokenParams, decide
from twotower.decoding.verifying import Verdict, places, verdict
from twotower.engine.context.sequences import ReadChunk, Sequences
from twotower.engine.context.writing import Alone
from twotower.engine.passes import USUAL_WIDTH
from twotower.engine.scheduler import Key
from twotower.engine.scores import MAX_LOGITS
from twotower.engine.steps import Rows, Step, take_all
from twotower.errors import NumericalError, TwoTowerError
from twotower.exchange.protocol import Decided, Took, Verifying
from twotower.model.tower import ContextTower
from twotower.model.transfer import on_device


class Verification:
    """Owns the sequences whose tokens the context tower decides for a denoiser.

    `tell(key, start, complete, decided)`: what has been read from `start` on. `fail(key, error)`: it cannot go on.
    """

    def __init__(
        self,
        tower: ContextTower,
        sequences: Sequences,
        tell: Callable[[Key, int, bool, Decided | None], None],
        fail: Callable[[Key, TwoTowerError], None],
    ) -> None:
        self._tower, self._sequences, self._tell, self._fail = tower, sequences, tell, fail
        self._verifying: dict[Key, Verifying] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._verifying

    def open(self, key: Key, verifying: Verifying) -> None:
        self._verifying[key] = verifying

    def forget(self, key: Key) -> None:
        self._verifying.pop(key, None)

    def alone(self, key: Key, most: int) -> Alone:
        """Tells, in one answer, the next tokens that the tower writes."""
        start, fails = self._sequences.length(key), partial(self._fail, key, not_finite())
        tell, eos = partial(self._tell, key, start, True), self._tower.config.eos_token_id
        return Alone(self._verifying[key], start, most, eos, tell, fails)

    def read(self, keys: Sequence[Key]) -> None:
        """The blocks of these, in one forward. Waits for the device: only the logits say where to cut."""
        started = time.perf_counter()
        blocks, hidden_RLD, scans = self._sequences.verify(keys)
        places_P2 = [(row, place) for row, block in enumerate(blocks) for place in range(len(block))]
        rows_P, columns_P = on_device(list(zip(*places_P2, strict=True)), hidden_RLD.device)
        starts = [self._sequences.length(key) for key in keys]
        rows = zip(keys, starts, blocks, strict=True)
        params = [one for key, start, block in rows for one in self._params(key, start + 1, len(block))]
        chosen = self._decide(hidden_RLD[rows_P, columns_P], params)
        [verdicts] = take_all([Step(chosen, partial(_verdicts, blocks))])
        self._sequences.settle(keys, scans, [verdict.cut for verdict in verdicts])
        took = Took(len(keys) * -(-max(map(len, blocks)) // USUAL_WIDTH), time.perf_counter() - started)
        for key, start, one in zip(keys, starts, verdicts, strict=True):
            self._has_decided(key, start, one, took)

    def wants_hidden(self, last: bool) -> bool:
        return last

    def has_read(self, chunks: Sequence[ReadChunk], hidden_RLD: Tensor) -> Step[None] | None:
        ends = [read for read in chunks if read.last]
        for read in chunks:
            if not read.last:
                self._tell(read.chunk.key, read.chunk.start, False, None)
        if not ends:
            return None
        hidden_RD = torch.stack([hidden_RLD[read.row, read.chunk.end - read.chunk.start - 1] for read in ends])
        params = [one for read in ends for one in self._params(read.chunk.key, read.chunk.end, 1)]
        return Step(self._decide(hidden_RD, params), partial(self._prompts_decided, ends))

    def _params(self, key: Key, position: int, count: int) -> list[TokenParams]:
        """How the tokens of so many positions are chosen."""
        verifying = self._verifying[key]
        return places(verifying.params, position - verifying.answer_start, count)

    def _decide(self, hidden_PD: Tensor, params: Sequence[TokenParams]) -> Tensor:
        """So many positions at a time that their logits stay within bounds."""
        at_once = max(1, MAX_LOGITS // self._tower.config.vocab_size)
        pieces = [
            decide(self._tower.logits(hidden_PD[first : first + at_once]), list(params[first : first + at_once]))
            for first in range(0, len(params), at_once)
        ]
        return torch.cat(pieces)

    def _prompts_decided(self, ends: Sequence[ReadChunk], chosen: Rows) -> None:
        for read, one in zip(ends, chosen, strict=True):
            self._has_decided(read.chunk.key, read.chunk.start, verdict([0], [one]))

    def _has_decided(self, key: Key, start: int, one: Verdict, took: Took | None = None) -> None:
        if one.finite:
            self._tell(key, start, True, Decided(one.token, one.margin, took=took))
        else:
            self._fail(key, not_finite())


def not_finite() -> NumericalError:
    return NumericalError("the context tower's logits hold a NaN or an infinity")


def _verdicts(blocks: Sequence[Sequence[int]], chosen: Rows) -> list[Verdict]:
    ends = accumulate(map(len, blocks), initial=0)
    return [verdict(block, chosen[start:end]) for block, (start, end) in zip(blocks, pairwise(ends), strict=True)]
