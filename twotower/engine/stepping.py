"""A denoiser's step of all rows that are ready: mode by mode, at what cost, and where memory is short.

Knows neither queue nor link; what was decided is for the engine.
"""

from collections.abc import Callable, Mapping

import torch

from twotower.core import Mode
from twotower.engine.meter import Meter, Pass
from twotower.engine.modes.strategy import DenoiserMode, LedSequence, Turns
from twotower.engine.passes import USUAL_WIDTH
from twotower.engine.short_memory import ShortMemory
from twotower.engine.steps import Step, clock_for, take_all
from twotower.errors import TwoTowerError


class Stepping:
    """`modes` in the order in which they launch. `commit`: what these sequences step on goes to the context tower
    before they step. `fail`: there is no memory for a sequence, not even alone."""

    def __init__(
        self,
        modes: Mapping[Mode, DenoiserMode],
        device: torch.device,
        meter: Meter,
        commit: Callable[[list[LedSequence]], None],
        fail: Callable[[LedSequence, TwoTowerError], None],
    ) -> None:
        self._modes, self._meter, self._commit, self._fail = modes, meter, commit, fail
        self._clock = clock_for(device)
        self.short = ShortMemory("denoiser")

    def step(self, ready: list[LedSequence]) -> list[Turns]:
        """A step of each. Several forwards are reckoned as equally dear."""
        started = self._clock()
        steps = self._launch(ready)
        turns = take_all(steps)
        if steps and not any(sequence.mode.commits_first for sequence in ready):
            seconds, rows = self._clock() - started, sum(map(usual_rows, ready))
            self._meter.note(Pass.STEP, max(1, rows // len(steps)), seconds / len(steps))
        return turns

    def _launch(self, ready: list[LedSequence]) -> list[Step[Turns]]:
        steps: list[Step[Turns]] = []
        for mode in self._modes.values():
            sequences = [sequence for sequence in ready if sequence.mode is mode]
            if not sequences:
                continue
            if mode.commits_first:
                self._commit(sequences)
            # A step only reads, and a sequence changes when the step's outcome is taken.
            steps += self.short.in_halves(sequences, mode.launch, self._fail)
        return steps


def usual_rows(sequence: LedSequence) -> int:
    """Rows of the usual width that it takes in a pass."""
    return -(-len(sequence.tokens) // USUAL_WIDTH)
