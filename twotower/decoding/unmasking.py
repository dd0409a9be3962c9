"""One diffusion step's decision: the guess for each masked position, and which positions are fixed now.

Follows the released script (docs/semantics.md, Modes). Every parameter is per row, so a row's result depends on
that row alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from twotower.config import MASK_TOKEN_ID
from twotower.core import GREEDY_BELOW
from twotower.decoding.bounds import UNBOUNDED, Bounds
from twotower.decoding.certain_prefix import Allowed
from twotower.decoding.guess_kernels import Guess, plain
from twotower.decoding.guesses import Draw, bounded_at_once, drawn, positions_at_once, restrict
from twotower.decoding.margins import closest
from twotower.model.transfer import on_device

_ABOVE_ZERO = 1e-45  # the smallest fp32 number: a threshold of 0 that can be divided by
_ABSENT = -1.0  # below every confidence
_COLUMNS = 3  # of an outcome, behind those of [R,L]

AtPlaces = Callable[[Tensor], Tensor]
"""Numbers [P,V] at these places of the flattened [R,L], the caller's to write into."""


@dataclass(frozen=True, slots=True)
class StepParams:
    """One row's parameters of a step. `steps_left` counts this step; `key` names its random numbers. `allowed`: the
    allowed tokens at one of its positions. `bounds`: the bounds of its draws.
    """

    confidence_threshold: float
    steps_left: int
    temperature: float = 0.0
    key: int = 0
    allowed: Allowed | None = None
    bounds: Bounds = UNBOUNDED

    @property
    def threshold(self) -> float:
        """A threshold that can be divided by."""
        return max(self.confidence_threshold, _ABOVE_ZERO)

    @property
    def samples(self) -> bool:
        return self.temperature >= GREEDY_BELOW

    @property
    def is_bounded(self) -> bool:
        """Whether its draws exclude tokens."""
        return self.samples and self.bounds.cut


@dataclass(frozen=True, slots=True)
class Piece:
    """Masked positions whose logits are made together. `places`: in the flattened [R,L]. `allowed`: which of them are
    restricted, and a bit for each token. `draw`: how their tokens are drawn; None: the likeliest tokens.
    """

    places: list[int]
    allowed: list[tuple[int, bytes]]
    draw: Draw | None


@dataclass(frozen=True)
class Blocks:
    """R blocks before a step, on the host: tokens, which positions are still masked, parameters."""

    tokens: Sequence[Sequence[int]]
    masked: Sequence[Sequence[bool]]
    rows: Sequence[StepParams]

    @property
    def width(self) -> int:
        """L, the width of the widest block."""
        return max(map(len, self.tokens))

    @property
    def mask_fractions(self) -> list[float]:
        """t of each block."""
        return [sum(mask) / len(mask) for mask in self.masked]

    @cached_property
    def at_least(self) -> list[int]:
        """The least number of positions that each row fixes at any confidence: one, and enough to finish in time."""
        return [max(1, -(-sum(mask) // row.steps_left)) for mask, row in zip(self.masked, self.rows, strict=True)]

    @property
    def plain(self) -> bool:
        """Whether a step needs only `given` and the places of masked positions."""
        return not any(row.samples or row.allowed is not None for row in self.rows)

    def places(self, width: int) -> list[int]:
        """The places of masked positions in the flattened [R,L], L = `width`."""
        return [row * width + place for row, mask in enumerate(self.masked) for place, m in enumerate(mask) if m]

    def pieces(self, width: int, at_once: int) -> Iterator[Piece]:
        """The masked positions in pieces. Positions that draw come last, in separate pieces; those with bounded draws
        come at the very end.
        """
        places, fewer = self.places(width), bounded_at_once(at_once)
        for samples, bounded, most in ((False, False, at_once), (True, False, at_once), (True, True, fewer)):
            alike = [
                place
                for place in places
                if (row := self.rows[place // width]).samples is samples and row.is_bounded is bounded
            ]
            for first in range(0, len(alike), most):
                yield self._piece(alike[first : first + most], width, samples, bounded)

    def _piece(self, places: list[int], width: int, samples: bool, bounded: bool) -> Piece:
        rows = [self.rows[place // width] for place in places]
        positions = [place % width for place in places]
        allowed = [
            (number, row.allowed.bits)
            for number, (row, position) in enumerate(zip(rows, positions, strict=True))
            if row.allowed is not None and row.allowed.place == position
        ]
        bounds = [row.bounds for row in rows] if bounded else None
        keys = [row.key for row in rows]
        draw = Draw([row.temperature for row in rows], keys, positions, bounds) if samples else None
        return Piece(places, allowed, draw)

    def given(self, device: torch.device, width: int) -> Tensor:
        """A step's input on the device: tokens, masked, threshold and `at_least`, [R,2L+2] in fp32.

        Padded to L = `width` with positions that are not masked.
        """
        given = []
        for ids, mask, row, at_least in zip(self.tokens, self.masked, self.rows, self.at_least, strict=True):
            padding = [0] * (width - len(ids))
            given.append([*ids, *padding, *mask, *padding, row.threshold, at_least])
        return on_device(given, device, torch.float32)

    def read(self, outcome: Sequence[Sequence[float]]) -> "list[Decision]":
        """The decisions of a step over these blocks, one for each row."""
        return [Decision(*row) for row in zip(outcome, self.rows, self.at_least, strict=True)]


class Decision:
    """A row of a step's outcome on the host; `predicted` and `confidence` are defined at masked positions only."""

    __slots__ = ("_at_least", "_outcome", "_threshold", "_width")

    def __init__(self, outcome: Sequence[float], params: StepParams, at_least: int) -> None:
        self._outcome, self._width = outcome, (len(outcome) - _COLUMNS) // 5
        self._threshold, self._at_least = params.threshold, at_least

    def _column(self, number: int) -> Sequence[float]:
        return self._outcome[number * self._width : (number + 1) * self._width]

    @property
    def tokens(self) -> list[int]:
        return list(map(int, self._column(0)))

    @property
    def committed(self) -> list[bool]:
        """Which positions were fixed in this step."""
        return list(map(bool, self._column(1)))

    @property
    def predicted(self) -> list[int]:
        return list(map(int, self._column(2)))

    @property
    def confidence(self) -> list[float]:
        return list(self._column(3))

    @property
    def finite(self) -> bool:
        """False if the row's logits hold a NaN or an infinity; then everything else is undefined."""
        return math.isfinite(self._outcome[-1])

    @property
    def margin(self) -> float:
        """The margin of the step's closest decision, in [0, 1] (`twotower.decoding.margins`)."""
        ordered, above, ratio = self._column(4), int(self._outcome[-3]), self._outcome[-2]
        fixed = min(max(above, self._at_least), self._width)
        least = ordered[-fixed]
        # The best of the others is held off by the threshold or, if nobody is above it, by the least of the fixed ones.
        if fixed < self._width:
            ratio = max(ratio, _divided(ordered[-fixed - 1], min(least, self._threshold)))
        # Where the threshold alone decides how many, the least of the fixed ones had to be above it.
        if above > self._at_least:
            ratio = max(ratio, _divided(self._threshold, least))
        return max(1 - ratio, 0.0)  # the threshold is fp32 on the device and a little off here


def unmask(
    logits_RLV: Tensor, blocks: Blocks, mask_token_id: int = MASK_TOKEN_ID, noise_RLV: Tensor | None = None
) -> Tensor:
    """`unmask_at` with given logits. `noise_RLV` replaces the uniform numbers (for the golden vectors)."""
    width, vocab = logits_RLV.shape[1:]
    noise_at = None if noise_RLV is None else _rows_of(noise_RLV)
    return unmask_at(_rows_of(logits_RLV), blocks, width, vocab, logits_RLV.device, mask_token_id, noise_at)


def unmask_at(
    logits_at: AtPlaces,
    blocks: Blocks,
    width: int,
    vocab: int,
    device: torch.device,
    mask_token_id: int = MASK_TOKEN_ID,
    noise_at: AtPlaces | None = None,
    guess: Guess = plain,
) -> Tensor:
    """Fix the positions of this step. Returns its outcome, an [R,5L+3] for the host to read at once: see `Decision`.

    A row fixes all positions whose confidence is strictly above its threshold, at least one, and at least enough to
    finish in time. The most confident come first; among equals, the later position. Only logits of masked positions are
    asked for, a piece at a time, each once; in fp32, unless `guess` takes another dtype. Bounded draws always use the
    plain function: a kernel reads logits in the order of their tokens.
    """
    pieces = [*blocks.pieces(width, positions_at_once(vocab))]
    places_P = on_device([place for piece in pieces for place in piece.places], device)
    guesses: list[Tensor] = []
    for piece, places_p in zip(pieces, places_P.split([len(piece.places) for piece in pieces]), strict=True):
        logits_pV = logits_at(places_p)
        restrict(logits_pV, piece.allowed)
        if piece.draw is not None and (noise_at is not None or piece.draw.bounds is not None):
            noise_pV = None if noise_at is None else noise_at(places_p)
            guesses.append(drawn(logits_pV.float(), mask_token_id, piece.draw, noise_pV))
        else:
            guesses.append(guess(logits_pV, mask_token_id, piece.draw))
    sampled = sum(len(piece.places) for piece in pieces if piece.draw is not None)
    drawn_M = places_P[len(places_P) - sampled :] if sampled else None
    return decided(torch.cat(guesses), places_P, blocks.given(device, width), width, drawn_M)


def decided(
    guesses_P4: Tensor, places_P: Tensor, given_RX: Tensor, width: int, drawn_M: Tensor | None = None
) -> Tensor:
    """The outcome, from guesses at these places and from `Blocks.given`. Uses tensors only, so that it can be recorded.
    `drawn_M`: the places whose tokens were drawn.
    """
    blank_N4 = given_RX.new_zeros(given_RX.shape[0] * width, 4)
    told_RL4 = blank_N4.index_copy(0, places_P, guesses_P4).view(-1, width, 4)
    predicted_RL, confidence_RL, ratio_RL, sum_RL = told_RL4.unbind(2)
    chosen = _choose(confidence_RL, given_RX)
    decided_RL = chosen.committed_RL
    if drawn_M is not None:
        # The two likeliest tokens of a position have almost one confidence. Two that were nearly drawn need not. So the
        # other one might have been fixed.
        decided_RL = decided_RL.flatten().index_fill(0, drawn_M, True).view(-1, width)
    return _outcome(chosen, predicted_RL, confidence_RL, closest(ratio_RL, decided_RL), sum_RL.sum(1, keepdim=True))


def _rows_of(whole_RLV: Tensor) -> AtPlaces:
    return partial(torch.index_select, whole_RLV.flatten(0, 1), 0)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Of every row: its tokens and masks before the step, and which positions were fixed. Also the confidences of the
    masked ones in rising order, and how many were above the threshold."""

    tokens_RL: Tensor
    masked_RL: Tensor
    committed_RL: Tensor
    ordered_RL: Tensor
    above_R1: Tensor


def _choose(confidence_RL: Tensor, given_RX: Tensor) -> _Chosen:
    width = confidence_RL.shape[1]
    tokens_RL, masked_RL, threshold_R1, at_least_R1 = given_RX.split([width, width, 1, 1], dim=1)
    masked_RL = masked_RL != 0
    keys_RL = torch.where(masked_RL, confidence_RL, _ABSENT)
    ordered_RL, order_RL = keys_RL.sort(dim=1, stable=True)
    above_R1 = (ordered_RL > threshold_R1).sum(1, keepdim=True)
    fixed_R1 = torch.maximum(above_R1, at_least_R1)
    last_RL = torch.arange(width, 0, -1, device=keys_RL.device) <= fixed_R1
    return _Chosen(tokens_RL, masked_RL, last_RL.scatter(1, order_RL, last_RL), ordered_RL, above_R1)


def _outcome(chosen: _Chosen, predicted_RL: Tensor, confidence_RL: Tensor, ratio_R: Tensor, sum_R1: Tensor) -> Tensor:
    """All columns are fp32, which holds every token id below 2^24. The sum of a row's logits is finite if they are."""
    out_RL = torch.where(chosen.committed_RL, predicted_RL, chosen.tokens_RL)
    columns = (chosen.committed_RL, predicted_RL, confidence_RL, chosen.ordered_RL, chosen.above_R1, ratio_R[:, None])
    return torch.cat([out_RL, *columns, sum_R1], dim=1)


def _divided(above: float, below: float) -> float:
    if above <= 0:
        return 0.0  # nobody
    return above / below if below else math.inf
