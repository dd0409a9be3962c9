"""Numbers derived from an experiment's results that more than one part of the report shows."""

import statistics
from collections.abc import Iterator

from benchmarks.engine_parts.experiment import Experiment, LongPrompt, Square
from benchmarks.engine_parts.plan import Variant
from benchmarks.engine_parts.recorder import FORWARD, STEP
from benchmarks.engine_parts.shares import Overlap, TickParts, overlap, tick_parts
from twotower.core import Mode

_BLOCK = 16


class Figures:
    """Reads results; computes ratios, a value per round."""

    def __init__(self, experiment: Experiment) -> None:
        self.plan, self.results, self.questions = experiment.plan, experiment.results, experiment.questions

    @property
    def ar(self) -> Variant:
        return next(variant for variant in self.plan.variants if variant.mode is Mode.AR)

    def squares(self, mode: Mode | None = None) -> list[Square]:
        variants = [v for v in self.plan.variants if mode is None or v.mode is mode]
        return [(variant, concurrency) for variant in variants for concurrency in self.plan.concurrency]

    def to_ceiling(self, square: Square, decide: bool = False, both: bool = False) -> list[float]:
        """Steady throughput over the ceiling of these bare passes."""
        costs = self.results.costs(decide, both=both)
        ceiling = self.results.ceiling(costs, square, self.plan.max_new_tokens)
        return [loaded.run.steady_tokens_per_s / ceiling.tokens_per_s for loaded in self.results.split[square]]

    def to_naive(self, square: Square) -> list[float]:
        pairs = zip(self.results.split[square], self.results.naive[square[0]], strict=True)
        return [loaded.run.tokens_per_s / naive.tokens_per_second for loaded, naive in pairs]

    def to_in_process(self, variant: Variant) -> list[float]:
        """Each round's service against the mean of the in-process runs before and after it."""
        local = [measured.tokens_per_second for measured in self.results.in_process[variant]]
        around = [(before + after) / 2 for before, after in zip(local[::2], local[1::2], strict=True)]
        pairs = zip(self.results.served[variant], around, strict=True)
        return [served.tokens_per_second / in_process for served, in_process in pairs]

    def tick_rows(self) -> Iterator[tuple[str, Square, TickParts]]:
        """Every tower that worked, in every watched run."""
        for square in self.squares():
            for tower in ("context",) if square[0].mode is Mode.AR else ("denoiser", "context"):
                ticks = self.ticks(tower, square)
                if ticks is not None:
                    yield tower, square, ticks

    def forward_to_bare(self, tower: str, square: Square) -> float | None:
        """CPU time of an engine's steps, commits or AR forwards over that of bare ones of as many rows; prompts left
        out."""
        bare, decided = self.results.costs(cpu=True), self.results.costs(True, cpu=True)
        costs, name, width = (decided.denoise, STEP, _BLOCK) if tower == "denoiser" else (bare.commit, FORWARD, _BLOCK)
        if square[0].mode is Mode.AR:
            costs, width = bare.ar, 1
        spans = self.results.watched[square].recordings[tower].spans
        forwards = [span for span in spans if span.name == name and span.width == width]
        if not forwards:
            return None
        return sum(span.cpu_s for span in forwards) / sum(costs(len(span.slots)) for span in forwards)

    def ticks(self, tower: str, square: Square) -> TickParts | None:
        watched = self.results.watched.get(square)
        if watched is None:
            return None
        recording = watched.recordings[tower]
        steps = [len(span.slots) for span in recording.spans if span.name == STEP]
        if not steps:
            return tick_parts(recording)
        forward, step = self.results.costs().denoise, self.results.costs(True).denoise
        return tick_parts(recording, sum(map(forward, steps)) / sum(map(step, steps)))

    def overlaps(self) -> Iterator[tuple[Square, Overlap]]:
        """Of every watched diffusion run, while at least two sequences (at concurrency 1: one) were active."""
        for square in self.squares(Mode.DIFFUSION):
            seen = overlap(self.results.watched[square].recordings, min(2, square[1]))
            if seen is not None:
                yield square, seen


def named(square: Square) -> str:
    return f"{square[0].name}, concurrency {square[1]}"


def stretch_s(seen: LongPrompt) -> float | None:
    """How much longer than usual the longest wait for a step was; None where the runs did not meet."""
    if not (seen.before and seen.during and seen.chunks):
        return None
    return max(seen.during) - statistics.median(seen.before)
