"""How long a denoiser had sequences but could step none of them."""

import time
from collections.abc import Callable, Iterable

from twotower.engine.modes.strategy import LedSequence


class HeldUp:
    """`commit_s`: time in which all of them waited for the deltas of their commits. `prompt_s`: the same, with at least
    one waiting for its prompt's deltas.

    Called at each tick with whether there is a step. The time counts from a tick without a step to the next one with a
    step, or without sequences.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.commit_s = self.prompt_s = 0.0
        self._since: float | None = None
        self._for_prompts = False

    def note(self, sequences: Iterable[LedSequence], steps: bool) -> None:
        if self._since is None and steps:
            return
        now = self._clock()
        if self._since is not None:
            self._count(now - self._since)
        waiting = [] if steps else [sequence for sequence in sequences if not sequence.closing]
        self._since = now if waiting else None
        self._for_prompts = any(_reads_prompt(sequence) for sequence in waiting)

    def _count(self, seconds: float) -> None:
        if self._for_prompts:
            self.prompt_s += seconds
        else:
            self.commit_s += seconds


def _reads_prompt(sequence: LedSequence) -> bool:
    """Nothing of it has been told here yet."""
    return sequence.answer.generated == len(sequence.request.committed)
