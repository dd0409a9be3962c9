"""Bare passes: what a tower's forward costs without an engine, inside the process that hosts the tower.

`pass`: the states made, the tower run, the logits where an engine needs them, through the same `Passes` an engine has.
`pass + decision`: also what an engine must do with the logits, unmask or sample. `eager`: the
pass without capture. After a pause a pass is dearer, because caches and core have gone cold. Rows hold different text,
so that the mixture of experts is as busy as in earnest.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twotower.decoding.sampling import TokenParams, sample
from twotower.decoding.unmasking import MASK_TOKEN_ID, Blocks, StepParams
from twotower.engine.capture import passes_for
from twotower.engine.passes import SHORT_PROMPT, USUAL_WIDTH, EagerPasses, Passes, Want
from twotower.model.cache import Span, TowerCache
from twotower.model.pages import pages_for
from twotower.model.tower import ContextTower, DenoiserTower

DENOISE, COMMIT, AR, PROMPT = "denoiser step", "commit", "AR step", "prompt"
_BLOCK = USUAL_WIDTH
_LEAST, _WARM_UP = 5, 3


@dataclass(frozen=True, slots=True)
class PassTime:
    """Medians in seconds: wall time, and CPU time of the thread that called."""

    wall_s: float
    cpu_s: float


class Bench:
    """The passes of one tower over a cache of its own, with `rows` sequences that have read `cached` tokens each."""

    def __init__(
        self, tower: ContextTower | DenoiserTower, prompts: Sequence[Sequence[int]], cached: int, capture: str
    ) -> None:
        self._tower, self._prompts, self._cached = tower, [list(prompt) for prompt in prompts], cached
        rows, longest = len(prompts), max(len(prompt) for prompt in prompts)
        pages = rows * (pages_for(cached + _BLOCK) + pages_for(longest))
        self.cache = TowerCache(tower.config, 2 * rows, pages, tower.device, tower.dtype)
        self._slots = [self.cache.allocate(cached + _BLOCK) for _ in range(rows)]
        self._fresh = [self.cache.allocate(longest) for _ in range(rows)]
        self._eager = EagerPasses(tower, self.cache)
        self._captured = passes_for(tower, self.cache, capture)
        with torch.inference_mode():
            self._captured.prepare(_BLOCK)

    @torch.inference_mode()
    def read(self) -> list[list[Any]]:
        """Context tower: let every row read text; then the cache's contents, for the denoiser's bench."""
        contents = []
        for slot, prompt in zip(self._slots, self._prompts, strict=True):
            text = (prompt * (self._cached // len(prompt) + 1))[: self._cached]
            self._eager.run([slot], [text], want=Want.STATES)
            self.cache.advance(slot, self._cached)
            contents.append([tensor.numpy().copy() for tensor in self.cache.delta([Span(slot, 0, self._cached)])])
        return contents

    @torch.inference_mode()
    def mirror(self, contents: list[list[Any]]) -> None:
        """Denoiser tower: take over what `read` returned."""
        for slot, arrays in zip(self._slots, contents, strict=True):
            self.cache.apply([Span(slot, 0, self._cached)], [torch.from_numpy(array) for array in arrays])

    @torch.inference_mode()
    def time(self, kind: str, rows: int, decide: bool, eager: bool, pause_s: float, seconds: float) -> PassTime:
        """Repeat one kind of pass for `seconds`, `pause_s` of sleep before each."""
        run = self._pass(kind, rows, decide, self._eager if eager else self._captured)
        walls: list[float] = []
        cpus: list[float] = []
        for _ in range(_WARM_UP):
            run()
        until = time.perf_counter() + seconds
        while len(walls) < _LEAST or time.perf_counter() < until:
            if pause_s:
                time.sleep(pause_s)
            started, cpu = time.perf_counter(), time.thread_time()
            run()
            walls.append(time.perf_counter() - started)
            cpus.append(time.thread_time() - cpu)
        return PassTime(statistics.median(walls), statistics.median(cpus))

    def _pass(self, kind: str, rows: int, decide: bool, passes: Passes) -> Callable[[], object]:
        slots, prompts = self._slots[:rows], self._prompts[:rows]
        blocks = [(prompt * _BLOCK)[:_BLOCK] for prompt in prompts]
        if kind == DENOISE:
            return _denoise(passes, slots, blocks, decide)
        if kind == COMMIT:
            return lambda: passes.run(slots, blocks, want=Want.STATES)
        if kind == AR:
            return _decode(passes, slots, [[prompt[-1]] for prompt in prompts], decide)
        assert kind == PROMPT, kind
        if max(map(len, prompts)) > SHORT_PROMPT:
            passes = self._eager  # as an engine does
        return lambda: passes.run(self._fresh[:rows], prompts, want=Want.STATES)


def _denoise(
    passes: Passes, slots: Sequence[int], blocks: Sequence[Sequence[int]], decide: bool
) -> Callable[[], object]:
    masked = [[i % 2 == 0 for i in range(_BLOCK)] for _ in blocks]
    tokens = [[MASK_TOKEN_ID if i % 2 == 0 else block[i] for i in range(_BLOCK)] for block in blocks]
    t = [0.5] * len(blocks)
    params = [StepParams(0.8, 8)] * len(blocks)

    def step() -> object:
        if not decide:
            return passes.run(slots, tokens, t, Want.HIDDEN)
        return passes.step(slots, Blocks(tokens, masked, params))

    return step


def _decode(
    passes: Passes, slots: Sequence[int], tokens: Sequence[Sequence[int]], decide: bool
) -> Callable[[], object]:
    params = [TokenParams(0.0, 0, 1.0, 0)] * len(tokens)

    def step() -> object:
        logits_RLV = passes.run(slots, tokens)
        return sample(logits_RLV[:, 0], params).tokens_R.tolist() if decide else logits_RLV

    return step
