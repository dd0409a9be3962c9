"""Verifies drafts: reads a block with logits, keeps the part that `ar` would have written, and decides the token after
it.

The token after a prompt is decided here, too. Knows neither ports nor how a draft was made.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.core import Likelihood
from twotower.decoding.likelihoods import beside, likelihood_of
from twotower.decoding.sampling import TokenParams, decide
from twotower.decoding.steering import Matcher, Steering
from twotower.decoding.verifying import Verdict, places, verdict
from twotower.engine.answer import no_way_on
from twotower.engine.context.sequences import ReadChunk, Sequences
from twotower.engine.context.writing import NOT_FINITE, Alone
from twotower.engine.passes import USUAL_WIDTH
from twotower.engine.scheduler import Key, PrefillChunk
from twotower.engine.scores import MAX_LOGITS
from twotower.engine.short_memory import ShortMemory
from twotower.engine.steps import Rows, Step, clock_for, take_all
from twotower.errors import NumericalError, TwoTowerError
from twotower.exchange.protocol import Decided, Rating, Took, Verifying
from twotower.model.tower import ContextTower
from twotower.model.transfer import on_device


class _Place(NamedTuple):
    """How the token of one position is chosen, and the number of alternatives in its likelihood, if it has one."""

    params: TokenParams
    alternatives: int | None


class Verification:
    """Owns the sequences whose tokens the context tower decides for a denoiser.

    `tell(key, start, complete, decided, likelihoods)`: called with what has been read from `start` on. `has_opened`: as
    in an Owner. `fail(key, error)`: called if the sequence cannot continue.
    """

    def __init__(
        self,
        tower: ContextTower,
        sequences: Sequences,
        tell: Callable[[Key, int, bool, Decided | None, Sequence[Likelihood]], None],
        has_opened: Callable[[Key, Sequence[PrefillChunk], bool], None],
        fail: Callable[[Key, TwoTowerError], None],
        short: ShortMemory,
    ) -> None:
        self._tower, self._sequences, self._tell, self._fail = tower, sequences, tell, fail
        self._has_opened, self._short = has_opened, short
        self._clock = clock_for(tower.device)
        self._verifying: dict[Key, Verifying] = {}
        self._ratings: dict[Key, Rating] = {}
        self._steering: dict[Key, Steering] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._verifying

    def open(
        self,
        key: Key,
        verifying: Verifying,
        rating: Rating | None,
        history: Sequence[int],
        matcher: Matcher | None = None,
    ) -> None:
        """`history`: the prompt and the answer so far."""
        self._verifying[key] = verifying
        if verifying.params.steers:
            prompt, answer = history[: verifying.answer_start], history[verifying.answer_start :]
            self._steering[key] = Steering(verifying.params, self._tower.config.eos_token_id, prompt, answer, matcher)
        if rating is not None:
            self._ratings[key] = rating

    def forget(self, key: Key) -> None:
        self._verifying.pop(key, None)
        self._ratings.pop(key, None)
        self._steering.pop(key, None)

    def alone(self, key: Key, most: int) -> Alone:
        """Let the tower write the next tokens, and tell them in one answer."""
        start, fails = self._sequences.length(key), partial(self._cannot_go_on, key)
        tell, eos = partial(self._tell, key, start, True), self._tower.config.eos_token_id
        steering = self._steering.get(key)
        return Alone(self._verifying[key], start, most, eos, self._alternatives(key), steering, tell, fails)

    def read(self, keys: Sequence[Key]) -> None:
        """Read the blocks of these sequences, in one forward if memory allows. Waits for the device: only the logits
        say where to cut.
        """
        self._short.in_halves(keys, self._read, self._fail)

    def _read(self, keys: Sequence[Key]) -> tuple[()]:
        """Nothing is changed before the states advance."""
        started = self._clock()
        blocks, hidden_RLD, scans = self._sequences.verify(keys)
        places_P2 = [(row, place) for row, block in enumerate(blocks) for place in range(len(block))]
        rows_P, columns_P = on_device(list(zip(*places_P2, strict=True)), hidden_RLD.device)
        starts = [self._sequences.length(key) for key in keys]
        rows = zip(keys, starts, blocks, strict=True)
        wanted = [one for key, start, block in rows for one in self._places(key, start + 1, len(block), block[1:])]
        chosen = self._decide(hidden_RLD[rows_P, columns_P], wanted)
        [rows_chosen] = take_all([Step(chosen, partial(_by_block, blocks))])
        asked = zip(keys, blocks, rows_chosen, strict=True)
        verdicts = [verdict(self._followed(key, block, made), made) for key, block, made in asked]
        cuts = [verdict.cut for verdict in verdicts]
        short = self._short.tried(len(keys), partial(self._sequences.settle, keys, scans, cuts))
        if short is not None:
            for key in keys:
                self._fail(key, short)
            return ()
        took = Took(len(keys) * -(-max(map(len, blocks)) // USUAL_WIDTH), self._clock() - started)
        for key, start, block, one, made in zip(keys, starts, blocks, verdicts, rows_chosen, strict=True):
            self._follow(key, one, block)
            self._has_decided(key, start, one, made, took)
        return ()

    def has_opened(self, key: Key, found: Sequence[PrefillChunk], whole: bool) -> None:
        self._has_opened(key, found, whole)

    def wants_hidden(self, last: bool) -> bool:
        return last

    def has_read(self, chunks: Sequence[ReadChunk], hidden_RLD: Tensor) -> Step[None] | None:
        ends = [read for read in chunks if read.last]
        for read in chunks:
            if not read.last:
                self._tell(read.chunk.key, read.chunk.start, False, None, ())
        if not ends:
            return None
        hidden_RD = torch.stack([hidden_RLD[read.row, read.chunk.end - read.chunk.start - 1] for read in ends])
        wanted = [one for read in ends for one in self._places(read.chunk.key, read.chunk.end, 1)]
        return Step(self._decide(hidden_RD, wanted), partial(self._prompts_decided, ends))

    def _places(self, key: Key, position: int, count: int, draft: Sequence[int] = ()) -> list[_Place]:
        verifying, alternatives = self._verifying[key], self._alternatives(key)
        first, steering = position - verifying.answer_start, self._steering.get(key)
        chosen = places(verifying.params, first, count, steering, draft)
        return [_Place(params, alternatives) for params in chosen]

    def _decide(self, hidden_PD: Tensor, wanted: Sequence[_Place]) -> Tensor:
        """So many positions at a time that their logits stay within bounds."""
        at_once = max(1, MAX_LOGITS // self._tower.config.vocab_size)
        most = max((place.alternatives for place in wanted if place.alternatives is not None), default=None)
        pieces = [
            self._piece(hidden_PD[first : first + at_once], wanted[first : first + at_once], most)
            for first in range(0, len(wanted), at_once)
        ]
        return torch.cat(pieces)

    def _piece(self, hidden_PD: Tensor, wanted: Sequence[_Place], most: int | None) -> Tensor:
        """The choices, followed by likelihoods if a request asks for them."""
        logits_PV = self._tower.logits(hidden_PD)
        decided_PC = decide(logits_PV, [place.params for place in wanted])
        if most is None:
            return decided_PC
        asked = [number for number, place in enumerate(wanted) if place.alternatives is not None]
        return beside(decided_PC, logits_PV, decided_PC[:, 0].long(), asked, most)

    def _prompts_decided(self, ends: Sequence[ReadChunk], chosen: Rows) -> None:
        for read, one in zip(ends, chosen, strict=True):
            decided = verdict([0], [one])
            self._follow(read.chunk.key, decided)
            self._has_decided(read.chunk.key, read.chunk.start, decided, [one])

    def _followed(self, key: Key, block: Sequence[int], made: Rows) -> Sequence[int]:
        """The part of the draft that the grammar's automaton could follow. The rest is dropped: the token before it
        becomes the next one, and the tower decides the token after that as in `ar`.
        """
        if key not in self._steering:
            return block
        return block[: max(1, next((place for place, row in enumerate(made) if not row[2]), len(block)))]

    def _follow(self, key: Key, one: Verdict, block: Sequence[int] = (0,)) -> None:
        """Where it has no token, it is not followed: what is wrong then is not the grammar's matter."""
        if one.finite and key in self._steering:
            self._steering[key].follow([*block[1 : one.cut], one.token])

    def _has_decided(self, key: Key, start: int, one: Verdict, made: Rows, took: Took | None = None) -> None:
        """`made`: a block's choices."""
        if one.finite:
            decided = Decided(one.token, one.margin, took=took)
            self._tell(key, start, True, decided, self._likelihoods(key, made[: one.cut]))
        else:
            self._cannot_go_on(key)

    def _cannot_go_on(self, key: Key) -> None:
        self._fail(key, no_way_on(self._steering.get(key)) or NumericalError(NOT_FINITE))

    def _likelihoods(self, key: Key, made: Rows) -> list[Likelihood]:
        alternatives = self._alternatives(key)
        return [] if alternatives is None else [likelihood_of(rated, alternatives) for _, _, _, *rated in made]

    def _alternatives(self, key: Key) -> int | None:
        rating = self._ratings.get(key)
        return None if rating is None else rating.alternatives


def _by_block(blocks: Sequence[Sequence[int]], chosen: Rows) -> list[Rows]:
    ends = accumulate(map(len, blocks), initial=0)
    return [chosen[start:end] for start, end in pairwise(ends)]
