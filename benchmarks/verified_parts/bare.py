"""Bare passes of both towers with what each decides, without an engine: the floor under an answer's time."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from twotower.core import DecodingParams, Mode
from twotower.decoding.sampling import TokenParams, decide
from twotower.decoding.unmasking import Blocks, StepParams
from twotower.decoding.verifying import places
from twotower.engine.passes import USUAL_WIDTH, Want
from twotower.engine.recorded import RecordedPasses
from twotower.model.cache import TowerCache
from twotower.model.tower import ContextTower, DenoiserTower

STEP, COMMIT, VERIFY, AR, PROMPT = "denoiser step", "commit", "verified read", "ar step", "prompt"
KINDS = (STEP, COMMIT, VERIFY, AR, PROMPT)
_CACHED, _ROOM, _WARM_UP = 32, 64, 5
_SMALLEST_CUT = 4  # of the accepted parts, which go from here to the whole block


@dataclass(frozen=True, slots=True)
class Seconds:
    """Medians by kind of pass, of so many rows."""

    rows: int
    of: dict[str, float]


class Bare:
    """Both towers over one cache of sequences that have read the same number of tokens, on the calling thread."""

    def __init__(self, context: ContextTower, denoiser: DenoiserTower, prompts: Sequence[Sequence[int]]) -> None:
        self._context, rows = context, len(prompts)
        self._cache = TowerCache(context.config, rows, rows * 8, context.device, context.dtype)
        self._reads, self._steps = RecordedPasses(context, self._cache), RecordedPasses(denoiser, self._cache)
        for passes in (self._reads, self._steps):
            passes.prepare(USUAL_WIDTH)
        self._all_slots = [self._cache.allocate(_ROOM) for _ in prompts]
        self._all_blocks = [_long(prompt, USUAL_WIDTH) for prompt in prompts]
        self._reads.run(self._all_slots, [_long(prompt, _CACHED) for prompt in prompts], want=Want.STATES)
        for slot in self._all_slots:
            self._cache.advance(slot, _CACHED)
        self._of(rows)
        self._passes: dict[str, Callable[[], object]] = {
            STEP: self._step,
            COMMIT: lambda: self._reads.run(self._slots, self._blocks, want=Want.STATES),
            VERIFY: self._verify,
            AR: self._ar,
            PROMPT: lambda: self._decide(self._reads.run(self._slots[:1], self._blocks[:1], want=Want.HIDDEN)[:, -1]),
        }

    def seconds(self, rows: int, repetitions: int, kinds: Sequence[str] = KINDS) -> Seconds:
        """Each of these kinds `repetitions` times, over the first so many rows."""
        self._of(rows)
        return Seconds(rows, {kind: _median(self._passes[kind], repetitions) for kind in kinds})

    def _of(self, rows: int) -> None:
        self._slots, self._blocks = self._all_slots[:rows], self._all_blocks[:rows]

    def _step(self) -> object:
        rows = [[False, *[True] * (USUAL_WIDTH - 1)] for _ in self._blocks]
        params = [StepParams(0.6, 2)] * len(rows)
        return self._steps.step(self._slots, Blocks(self._blocks, rows, params)).tolist()

    def _verify(self) -> None:
        hidden_RLD, scans = self._reads.verify(self._slots, self._blocks)
        self._decide(hidden_RLD.flatten(0, 1))
        cuts = [_SMALLEST_CUT + row % (USUAL_WIDTH + 1 - _SMALLEST_CUT) for row in range(len(self._slots))]
        self._cache.settle(self._slots, scans, cuts)
        for slot, cut in zip(self._slots, cuts, strict=True):
            self._cache.advance(slot, -cut)

    def _ar(self) -> None:
        self._decide(self._reads.run(self._slots, [block[:1] for block in self._blocks])[:, 0], logits=True)

    def _decide(self, given: torch.Tensor, logits: bool = False) -> object:
        params: list[TokenParams] = places(DecodingParams(Mode.AR), 0, len(given))
        return decide(given if logits else self._context.logits(given), params).tolist()


def _long(prompt: Sequence[int], length: int) -> list[int]:
    return (list(prompt) * (length // len(prompt) + 1))[:length]


@torch.inference_mode()
def _median(run: Callable[[], object], repetitions: int) -> float:
    taken = []
    for number in range(_WARM_UP + repetitions):
        started = time.perf_counter()
        run()
        if number >= _WARM_UP:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)
