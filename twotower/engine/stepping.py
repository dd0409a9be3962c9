"""A denoiser's step of all ready rows: mode by mode, with its costs, and with shortages of memory.

Knows neither queue nor link; the engine handles the decisions.
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
    """`modes` in launch order. `commit`: sends the tokens of these sequences to the context tower before they step.
    `fail`: called if there is no memory for a sequence, even alone.
    """

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
        """Step each sequence. Several forwards count as equally expensive."""
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
    """The number of rows of the usual width in a pass."""
    return -(-len(sequence.tokens) // USUAL_WIDTH)
