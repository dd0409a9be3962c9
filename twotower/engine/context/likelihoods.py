"""Rates tokens that denoisers decide: their log-probabilities under the context tower, as it reads a block.

A block's first token follows from the last position read before, whose hidden state is kept. Knows neither ports nor
how the tokens were decided.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from twotower.core import Likelihood
from twotower.decoding.likelihoods import is_finite, likelihood_of, rate
from twotower.engine.context.sequences import ReadChunk
from twotower.engine.scheduler import Key, PrefillChunk
from twotower.engine.scores import MAX_LOGITS
from twotower.engine.steps import Rows, Step, take_all
from twotower.exchange.protocol import Rating
from twotower.model.tower import ContextTower
from twotower.model.transfer import on_device


class Likelihoods:
    """Owns the sequences whose tokens are rated while they are read.

    `tell(key, start, complete)`: called when a part of the prompt has been read from `start` on. `has_opened`: as in an
    Owner.
    """

    def __init__(
        self,
        tower: ContextTower,
        tell: Callable[[Key, int, bool], None],
        has_opened: Callable[[Key, Sequence[PrefillChunk], bool], None],
    ) -> None:
        self._tower, self._tell, self._has_opened = tower, tell, has_opened
        self._ratings: dict[Key, Rating] = {}
        self._last: dict[Key, Tensor] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._ratings

    def open(self, key: Key, rating: Rating) -> None:
        self._ratings[key] = rating

    def forget(self, key: Key) -> None:
        self._ratings.pop(key, None)
        self._last.pop(key, None)

    def has_opened(self, key: Key, found: Sequence[PrefillChunk], whole: bool) -> None:
        self._has_opened(key, found, whole)

    def wants_hidden(self, last: bool) -> bool:
        return last

    def has_read(self, chunks: Sequence[ReadChunk], hidden_RLD: Tensor) -> None:
        for read_chunk in chunks:
            chunk = read_chunk.chunk
            if read_chunk.last:
                self._last[chunk.key] = hidden_RLD[read_chunk.row, chunk.end - chunk.start - 1].clone()
            self._tell(chunk.key, chunk.start, read_chunk.last)

    def of(
        self, blocks: Mapping[Key, tuple[int, Sequence[int]]], rows: Mapping[Key, Tensor]
    ) -> dict[Key, list[Likelihood] | None]:
        """The likelihoods of blocks that have just been read, each from its first position on; None if logits are not
        finite. `rows`: the blocks' hidden states [L,D]. Waits for the device.
        """
        hidden, tokens, counts = [], list[int](), dict[Key, int]()
        for key, (start, block) in blocks.items():
            told_before = max(0, self._ratings[key].start - start)
            rated = block[told_before:]
            if rated and not told_before:
                hidden.append(self._last[key][None])
            hidden.append(rows[key][max(0, told_before - 1) : len(block) - 1])
            tokens += rated
            counts[key] = len(rated)
            self._last[key] = rows[key][len(block) - 1].clone()
        if not tokens:
            return {key: [] for key in blocks}
        most = max(self._ratings[key].alternatives for key in blocks)
        step = Step(self._rated(torch.cat(hidden), tokens, most), partial(self._read, counts))
        [likelihoods] = take_all([step])
        return likelihoods

    def _rated(self, hidden_PD: Tensor, tokens: Sequence[int], most: int) -> Tensor:
        """So many positions at a time that their logits stay within bounds."""
        pieces = max(1, MAX_LOGITS // self._tower.config.vocab_size)
        tokens_P = on_device(tokens, hidden_PD.device)
        parts = zip(hidden_PD.split(pieces), tokens_P.split(pieces), strict=True)
        return torch.cat([rate(self._tower.logits(hidden_pD), tokens_p, most) for hidden_pD, tokens_p in parts])

    def _read(self, counts: Mapping[Key, int], outcome: Rows) -> dict[Key, list[Likelihood] | None]:
        ends = accumulate(counts.values(), initial=0)
        return {
            key: self._likelihoods(key, outcome[start:end])
            for key, (start, end) in zip(counts, pairwise(ends), strict=True)
        }

    def _likelihoods(self, key: Key, rated: Rows) -> list[Likelihood] | None:
        if not all(map(is_finite, rated)):
            return None
        return [likelihood_of(row, self._ratings[key].alternatives) for row in rated]
