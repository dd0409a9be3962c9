"""The table of targets: measure, what we got, what is to be reached, whether it is."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.engine_parts.figures import Figures, named, stretch_s
from benchmarks.engine_parts.load import diffusion_gaps
from benchmarks.engine_parts.shares import percentile
from benchmarks.reference.report import spread, table

_CROWD = 4  # concurrency from which the exchange has to be hidden
_NAIVE_AIM = {1: 1.5, 4: 4.0, 16: 8.0}


@dataclass(frozen=True, slots=True)
class Line:
    """`reached` None: nothing was asked for but to report, or the measurement did not come about."""

    measure: str
    got: str
    wanted: str
    reached: bool | None = None

    @property
    def cells(self) -> list[str]:
        return [self.measure, self.got, self.wanted, {True: "yes", False: "**no**", None: "–"}[self.reached]]


def main_table(figures: Figures) -> str:
    parts = (_ceiling, _naive, _busy, _exchange, _served, _between_blocks, _long_prompt, _outside, _memory)
    cells = [line.cells for part in parts for line in part(figures)]
    return "## Targets\n\n" + table(["measure", "got", "to reach", "reached"], cells)


def _ceiling(figures: Figures) -> Iterator[Line]:
    for square in figures.squares():
        ratios = figures.to_ceiling(square)
        reached = statistics.median(ratios) >= 0.8
        yield Line(f"throughput ÷ ceiling of bare passes, {named(square)}", spread(ratios, 2), "≥ 0.8", reached)
    ticks = figures.ticks("context", (figures.ar, 1))
    if ticks is not None:
        ratio = ticks.tick_s / figures.results.costs().ar(1)
        yield Line("AR step in the engine ÷ its bare pass, concurrency 1", f"{ratio:.2f}", "≤ 1.2", ratio <= 1.2)


def _naive(figures: Figures) -> Iterator[Line]:
    for square in figures.squares():
        aim = f"report; aim {_NAIVE_AIM[square[1]]:g}" if square[1] in _NAIVE_AIM else "report"
        yield Line(f"throughput ÷ naive loop, {named(square)}", spread(figures.to_naive(square), 2), aim)


def _busy(figures: Figures) -> Iterator[Line]:
    for square, seen in figures.overlaps():
        if square[1] >= 2:
            name = f"share of time the denoiser computes while ≥ 2 are active, {named(square)}"
            got = f"{seen.denoiser:.1%}; {seen.rows:.1f} rows per tick of {seen.active:.1f} active"
            yield Line(name, got, "≥ 90 %", seen.denoiser >= 0.9)


def _exchange(figures: Figures) -> Iterator[Line]:
    for square, seen in figures.overlaps():
        if square[1] >= _CROWD:
            name = f"exchange while neither tower computes, share of the time, {named(square)}"
            yield Line(name, f"{seen.exchange:.1%}", "≤ 3 %", seen.exchange <= 0.03)


def _served(figures: Figures) -> Iterator[Line]:
    for variant in figures.results.served:
        ratios = figures.to_in_process(variant)
        name = f"served over gRPC ÷ in process, {named((variant, figures.plan.most))}"
        yield Line(name, spread(ratios, 2), "≥ 0.9", statistics.median(ratios) >= 0.9)


def _between_blocks(figures: Figures) -> Iterator[Line]:
    gaps = [diffusion_gaps(run) for run in figures.results.mixed]
    ratios = [percentile(some, 99) / percentile(some, 50) for some in gaps]
    name = f"time between committed blocks ÷ steps, p99 ÷ p50, mixed arrivals, concurrency {figures.plan.most}"
    yield Line(name, spread(ratios, 2), "≤ 3", statistics.median(ratios) <= 3)


def _long_prompt(figures: Figures) -> Iterator[Line]:
    for variant, seen in figures.results.long_prompts.items():
        tokens = figures.plan.long_prompt
        name = f"longest time between steps while a {tokens}-token prompt is read − the usual, {variant.name}"
        stretch = stretch_s(seen)
        if stretch is None:
            yield Line(name, "the runs did not meet", "≤ one chunk")
            continue
        chunk = max(seen.chunks)
        got = f"{stretch * 1e3:.1f} ms; the longest chunk took {chunk * 1e3:.1f} ms"
        yield Line(name, got, "≤ one chunk", stretch <= chunk)


def _outside(figures: Figures) -> Iterator[Line]:
    for tower, square, ticks in figures.tick_rows():
        name = f"tick time outside the model forward, {tower} tower, {named(square)}"
        yield Line(name, f"{ticks.outside_forward:.1%}", "≤ 20 %", ticks.outside_forward <= 0.2)


def _memory(figures: Figures) -> Iterator[Line]:
    for tower, (predicted, allocated) in figures.results.memory.items():
        ratio = predicted.total / allocated
        name = f"tensor bytes predicted at start ÷ allocated, {tower} tower"
        yield Line(name, f"{ratio:.3f}", "0.9 to 1.1", 0.9 <= ratio <= 1.1)
