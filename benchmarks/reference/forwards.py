"""Bare tower passes at batch 1, over the naive loop's states and over ours: how fair the baseline is.

Both sides time what a pass costs its caller: making the pass's states, running the tower, keeping what it wrote. No
logits, no decision, no engine. A third column has our passes as engines on a CPU replay them, recorded: a trick that
the naive loop does without.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.reference.naive_loop import NaiveLoop
from twotower.engine.passes import Want
from twotower.engine.recorded import RecordedPasses
from twotower.model.cache import TowerCache
from twotower.model.tower import ContextTower, DenoiserTower

FAIR = 1.3
_BLOCK = 16
Pass = Callable[[], object]


@dataclass(frozen=True, slots=True)
class ForwardTime:
    """One kind of pass after `cached` tokens; seconds, a value per repetition. `ours` and `naive` are eager."""

    name: str
    cached: int
    ours: tuple[float, ...]
    naive: tuple[float, ...]
    recorded: tuple[float, ...]

    @property
    def ours_s(self) -> float:
        return statistics.median(self.ours)

    @property
    def naive_s(self) -> float:
        return statistics.median(self.naive)

    @property
    def recorded_s(self) -> float:
        return statistics.median(self.recorded)

    @property
    def ratio(self) -> float:
        """Naive over ours, both eager, of the medians."""
        return self.naive_s / self.ours_s


@torch.inference_mode()
def compare_forwards(
    context: ContextTower, denoiser: DenoiserTower, cached: int, repetitions: int
) -> list[ForwardTime]:
    """Every kind of pass the loop makes, timed alternately."""
    times = []
    for name, sides in _passes(context, denoiser, cached).items():
        seconds: list[list[float]] = [[] for _ in sides]
        for repetition in range(-2, repetitions):
            for side, run in enumerate(sides):
                started = time.perf_counter()
                run()
                if repetition >= 0:
                    seconds[side].append(time.perf_counter() - started)
        times.append(ForwardTime(name, cached, *map(tuple, seconds)))
    return times


def _passes(context: ContextTower, denoiser: DenoiserTower, cached: int) -> dict[str, tuple[Pass, Pass, Pass]]:
    """Ours, the naive loop's, ours recorded."""
    vocab = context.config.vocab_size
    seen = [4 + i % (vocab - 4) for i in range(cached)]
    block = torch.full((_BLOCK,), 3)
    half_masked = torch.tensor([0.5])

    loop = NaiveLoop(context, denoiser)
    naive_cache, _, _ = loop.prefill(seen)

    # The prompt's pass starts from a fresh slot, the others from one that has read it. Those do not advance it: each
    # writes the same positions again, so every repetition sees the same length.
    cache = TowerCache(context.config, 2, 2 * (cached // 16 + 3), context.device, context.dtype)
    fresh, slot = (cache.allocate(cached + _BLOCK) for _ in range(2))

    def extend(slot: int, tokens: list[int]) -> None:
        context(torch.tensor([tokens]), cache.extending([slot], [len(tokens)], len(tokens)))

    def denoise() -> None:
        denoiser(block[None], cache.reading([slot], [_BLOCK], _BLOCK), half_masked)

    extend(slot, seen)
    cache.advance(slot, cached)
    reads, steps = (RecordedPasses(tower, cache, often=1) for tower in (context, denoiser))
    empty = naive_cache.empty(context.config, context.device, context.dtype)
    return {
        f"denoiser step [1,{_BLOCK}]": (
            denoise,
            lambda: loop.denoise(naive_cache, block, 0.5),
            lambda: steps.run([slot], [block.tolist()], [0.5], Want.HIDDEN),
        ),
        f"commit [1,{_BLOCK}]": (
            lambda: extend(slot, block.tolist()),
            lambda: loop.extend(naive_cache, block.tolist()),
            lambda: reads.run([slot], [block.tolist()], want=Want.STATES),
        ),
        "AR step [1,1]": (
            lambda: extend(slot, [5]),
            lambda: loop.extend(naive_cache, [5]),
            lambda: reads.run([slot], [[5]], want=Want.HIDDEN),
        ),
        f"prompt [1,{cached}]": (
            lambda: extend(fresh, seen),
            lambda: loop.extend(empty, seen),
            lambda: reads.run([fresh], [seen], want=Want.STATES),
        ),
    }
