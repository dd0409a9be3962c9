"""`mock_ar`: the denoiser steps on the newest token and predicts the next one, while the context tower reads the newest
one.
"""

from functools import partial

from twotower.core import Request
from twotower.decoding.sampling import decide
from twotower.engine.answer import Cost
from twotower.engine.modes.strategy import NOT_FINITE, DenoiserMode, LedSequence, Turn, Turns
from twotower.engine.passes import Passes
from twotower.engine.steps import Rows, Step


class MockAr(DenoiserMode):
    """A token a step. The mirror stays one token behind the answer."""

    commits_first = True

    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def prompt(self, request: Request) -> tuple[int, ...]:
        return request.history[:-1]

    def open(self, sequence: LedSequence) -> None:
        sequence.tokens = [sequence.request.history[-1]]

    def launch(self, sequences: list[LedSequence]) -> list[Step[Turns]]:
        logits_RV = self._passes.run([s.slot for s in sequences], [s.tokens for s in sequences])[:, 0]
        outcome_R3 = decide(logits_RV, [s.answer.next_token for s in sequences])
        return [Step(outcome_R3, partial(_turns, sequences))]


def _turns(sequences: list[LedSequence], outcome: Rows) -> Turns:
    return [(s, _turn(s, *decision)) for s, decision in zip(sequences, outcome, strict=True)]


def _turn(sequence: LedSequence, token: float, margin: float, finite: float) -> Turn:
    if not finite:
        return NOT_FINITE
    sequence.tokens = [int(token)]
    return Turn(margin, sequence.tokens, Cost(num_steps=1))
