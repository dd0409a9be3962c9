"""Scoring while prompts are read: which positions of a chunk are scored, their numbers, and a request's scores so far.

Knows hidden states and the head; does not know slots, queues or links.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from twotower.core import Likelihood, ScoreEvent, ScoreRequest
from twotower.decoding.likelihoods import beside, likelihood_of
from twotower.decoding.scoring import Scored, score
from twotower.engine.scheduler import PrefillChunk
from twotower.model.tower import ContextTower
from twotower.model.transfer import on_device

# Logits at a time: 64 MiB in fp32, and some three times that with the tensors computed from them. The whole of a chunk
# of 512 positions would be four times as much with a vocabulary of 131,072.
MAX_LOGITS = 1 << 24


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token's numbers on the host. `finite`: the logits hold no NaN and no infinity. `rated`: the input of
    `likelihood_of`, if the request asks for likelihoods.
    """

    log_prob: float
    is_greedy: bool
    margin: float
    finite: bool
    rated: Sequence[float] = ()


@dataclass(slots=True)
class ScoreSheet:
    """A request's scores so far. `cached_tokens`: the number of tokens that need not be read."""

    request: ScoreRequest
    log_probs: list[float] = field(default_factory=list)
    is_greedy: list[bool] = field(default_factory=list)
    margin: float = 1.0
    likelihoods: list[Likelihood] = field(default_factory=list)
    cached_tokens: int = 0

    def positions(self, start: int, end: int) -> range:
        """The positions within [start, end) whose logits score the next token."""
        return range(max(start, self.request.start - 1), end)

    def add(self, scores: Iterable[TokenScore]) -> None:
        for token in scores:
            self.log_probs.append(token.log_prob)
            self.is_greedy.append(token.is_greedy)
            self.margin = min(self.margin, token.margin)
            if self.request.logprobs is not None:
                self.likelihoods.append(likelihood_of(token.rated, self.request.logprobs))

    def event(self) -> ScoreEvent:
        log_probs, is_greedy, likelihoods = tuple(self.log_probs), tuple(self.is_greedy), tuple(self.likelihoods)
        return ScoreEvent(self.request.id, log_probs, is_greedy, self.margin, likelihoods, self.cached_tokens)


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row of a prefill batch that read positions from `start` on, and the scored ones among them."""

    row: int
    sheet: ScoreSheet
    start: int
    positions: range

    @classmethod
    def of(cls, row: int, sheet: ScoreSheet, chunk: PrefillChunk) -> "ScoredRow":
        return cls(row, sheet, chunk.start, sheet.positions(chunk.start, chunk.end))


def score_rows(tower: ContextTower, hidden_RLD: Tensor, rows: Sequence[ScoredRow]) -> Tensor:
    """The scores of all rows' positions, row after row, on the device; `by_row` reads them.

    The head is applied at these positions only, to so many at a time that their logits stay within bounds.
    """
    device = hidden_RLD.device
    places = [(row.row, position - row.start) for row in rows for position in row.positions]
    tokens = [row.sheet.request.token_ids[position + 1] for row in rows for position in row.positions]
    rows_P, columns_P = on_device(list(zip(*places, strict=True)), device)
    at_once = max(1, MAX_LOGITS // tower.config.vocab_size)
    hidden_PD, tokens_P = hidden_RLD[rows_P, columns_P], on_device(tokens, device)
    asked = [row.sheet.request.logprobs is not None for row in rows for _ in row.positions]
    most = max((n for row in rows if (n := row.sheet.request.logprobs) is not None), default=None)
    pieces = []
    for first in range(0, len(tokens), at_once):
        part = slice(first, first + at_once)
        pieces.append(_piece(tower.logits(hidden_PD[part]), tokens_P[part], asked[part], most))
    return torch.cat(pieces)


def _piece(logits_PV: Tensor, tokens_P: Tensor, asked: Sequence[bool], most: int | None) -> Tensor:
    """Scores of some positions, followed by the alternatives of the positions `asked`."""
    scored_P4 = _packed(score(logits_PV, tokens_P))
    if most is None:
        return scored_P4
    return beside(scored_P4, logits_PV, tokens_P, [place for place, is_asked in enumerate(asked) if is_asked], most)


def _packed(scored: Scored) -> Tensor:
    """Columns in fp32, so that the host reads them all at once."""
    columns = (scored.log_prob_P, scored.is_greedy_P, scored.margin_P, scored.finite_P)
    return torch.stack([column.float() for column in columns], dim=1)


def by_row(outcome: Iterable[Sequence[float]], rows: Sequence[ScoredRow]) -> list[list[TokenScore]]:
    """Each row's scores, of what `score_rows` gave as the host reads it."""
    scores = [
        TokenScore(log_prob, bool(is_greedy), margin, bool(finite), rated)
        for log_prob, is_greedy, margin, finite, *rated in outcome
    ]
    ends = accumulate((len(row.positions) for row in rows), initial=0)
    return [scores[start:end] for start, end in pairwise(ends)]
