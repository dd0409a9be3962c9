"""How a denoiser engine has its steps decided: eagerly, or by a recorded program where its passes are recorded too.

A decision is some thirty small operations, which called from Python take half as long again (`engine/recorded.py` says
why). Only greedy ones are recorded: a sampled row's random numbers depend on more than tensors.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from twotower.decoding.unmasking import Blocks, StepParams, unmask, unmask_greedily
from twotower.engine.recorded import MOST_PROGRAMS, traced

_Program = Callable[[Tensor, Tensor], Tensor]


class Decisions:
    """Decides steps on `device`. Greedy ones of a width that has come up `often` times are recorded; None: never."""

    def __init__(self, device: torch.device, often: int | None) -> None:
        self._device, self._often = device, often
        self._programs: dict[int, _Program] = {}
        self._uses: Counter[int] = Counter()

    def run(self, logits_RLV: Tensor, blocks: Blocks) -> Tensor:
        """As `unmask`."""
        program = self._program(logits_RLV) if blocks.greedy else None
        return unmask(logits_RLV, blocks) if program is None else program(logits_RLV, blocks.given(self._device))

    def prepare(self, width: int, vocab: int) -> None:
        """Make ready for blocks of `width`."""
        if self._often is not None and width not in self._programs:
            self._programs[width] = record_decision(width, vocab, self._device)

    def _program(self, logits_RLV: Tensor) -> _Program | None:
        width, vocab = logits_RLV.shape[1:]
        program = self._programs.get(width)
        if program is None and self._often is not None and len(self._programs) < MOST_PROGRAMS:
            self._uses[width] += 1
            if self._uses[width] >= self._often:
                self.prepare(width, vocab)
        return program


def record_decision(width: int, vocab: int, device: torch.device) -> _Program:
    """A program for any number of greedy rows of `width` positions."""
    blocks = Blocks([[0] * width] * 2, [[True] * width] * 2, [StepParams(0.5, 1)] * 2)
    logits_RLV = torch.arange(2.0 * width * vocab, device=device).view(2, width, vocab).sin()
    return traced(unmask_greedily, (logits_RLV, blocks.given(device)))
