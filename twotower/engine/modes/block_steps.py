"""Steps over blocks that begin masked: which rows share a forward, and how a step changes a block.

Knows neither when a block is full nor what happens then: a mode decides that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from twotower.core import RequestId, StepEvent
from twotower.decoding.unmasking import Blocks, Decision, StepParams
from twotower.engine.modes.strategy import NOT_FINITE, LedSequence, Turn, Turns
from twotower.engine.passes import MAX_POSITIONS, Passes
from twotower.engine.steps import Rows, Step

_NARROW = 16


@dataclass(frozen=True, slots=True)
class StepTrace:
    """What one step saw and did, for observers: the tokens before it and the positions it fixed.

    `margin` is that of its closest decision (`twotower.decoding.margins`).
    """

    request_id: RequestId
    block: int
    step: int
    t: float
    tokens: tuple[int, ...]
    predicted: tuple[int, ...]
    confidence: tuple[float, ...]
    committed: tuple[int, ...]
    margin: float


class BlockSteps:
    """Rows of like width share a forward, each at its own step of its own block."""

    def __init__(self, passes: Passes, trace: Callable[[StepTrace], None] | None) -> None:
        self._passes, self._trace = passes, trace

    def launch(
        self,
        sequences: Sequence[LedSequence],
        params: Callable[[LedSequence], StepParams],
        turn: Callable[[LedSequence, Decision], Turn],
    ) -> list[Step[Turns]]:
        """Step each sequence. `turn` gets a sequence after its step."""
        return [self._step(batch, params, turn) for batch in of_like_width(sequences)]

    def _step(
        self,
        sequences: list[LedSequence],
        params: Callable[[LedSequence], StepParams],
        turn: Callable[[LedSequence, Decision], Turn],
    ) -> Step[Turns]:
        blocks = Blocks([s.tokens for s in sequences], [s.masked for s in sequences], list(map(params, sequences)))
        outcome = self._passes.step([s.slot for s in sequences], blocks)
        return Step(outcome, partial(self._turns, sequences, blocks, turn))

    def _turns(
        self,
        sequences: list[LedSequence],
        blocks: Blocks,
        turn: Callable[[LedSequence, Decision], Turn],
        outcome: Rows,
    ) -> Turns:
        decisions = zip(sequences, blocks.read(outcome), strict=True)
        return [(s, self._stepped(s, decision, turn)) for s, decision in decisions]

    def _stepped(
        self, sequence: LedSequence, decision: Decision, turn: Callable[[LedSequence, Decision], Turn]
    ) -> Turn:
        if self._trace is not None:
            self._trace(_traced(sequence, decision))
        if not decision.finite:
            return NOT_FINITE
        told = _told(sequence, decision) if sequence.request.trace else None
        if sequence.unrated is not None:
            sequence.confidence |= {p: decision.confidence[p] for p, now in enumerate(decision.committed) if now}
        sequence.tokens = decision.tokens[: len(sequence.tokens)]
        # Padding is not masked and so cannot have been fixed.
        sequence.masked = [m and not now for m, now in zip(sequence.masked, decision.committed, strict=False)]
        sequence.step += 1
        taken = turn(sequence, decision)
        return taken if told is None else replace(taken, trace=told)


def _traced(sequence: LedSequence, decision: Decision) -> StepTrace:
    size = len(sequence.tokens)
    return StepTrace(
        sequence.request.id,
        sequence.block,
        sequence.step,
        sum(sequence.masked) / size,
        tuple(sequence.tokens),
        tuple(decision.predicted[:size]),
        tuple(decision.confidence[:size]),
        tuple(place for place, now in enumerate(decision.committed) if now),
        decision.margin,
    )


def _told(sequence: LedSequence, decision: Decision) -> StepEvent:
    start, known = sequence.answer.generated, sequence.known
    places = [place for place, now in enumerate(decision.committed) if now]
    predicted, confidence = decision.predicted, decision.confidence
    return StepEvent(
        sequence.request.id,
        start,
        len(sequence.tokens) - known,
        sequence.step,
        tuple(start - known + place for place in places),
        tuple(predicted[place] for place in places),
        tuple(confidence[place] for place in places),
    )


def of_like_width(sequences: Sequence[LedSequence]) -> list[list[LedSequence]]:
    """Batches for one forward each. Rows are padded to the widest, so a wide block must not widen everybody's.

    Blocks of up to `_NARROW` positions share one forward. Wider blocks share a forward with blocks of the same power of
    two. No forward takes more than `MAX_POSITIONS`, so that its logits always fit into memory.
    """
    by_width: dict[int, list[LedSequence]] = {}
    for sequence in sequences:
        size = len(sequence.tokens)
        by_width.setdefault(_NARROW if size <= _NARROW else 1 << (size - 1).bit_length(), []).append(sequence)
    batches = []
    for width, group in by_width.items():
        rows = max(1, MAX_POSITIONS // width)
        batches += [group[first : first + rows] for first in range(0, len(group), rows)]
    return batches
