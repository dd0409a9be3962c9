"""The result as markdown and a picture: cells, waiting requests and latency over time; the overload in a table."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.autoscaling_parts.load import REFUSED, Asked, answered, between, quantile
from benchmarks.reference.report import bullets, table

_INK, _ACCENT, _LIGHT = "#333333", "#1f6f8b", "#a9d0da"
_STEP_S = 0.5


@dataclass
class Wave:
    """A burst between two valleys. `marks`: when each phase began and the last ended. `cells`: how many served, and
    `started`: how many had a process, at each moment of watching."""

    marks: list[float]
    asked: list[Asked]
    cells: list[tuple[float, int]] = field(default_factory=list)
    started: list[tuple[float, int]] = field(default_factory=list)

    def serving(self, cells: int, after: float) -> float | None:
        """Seconds after this moment until at least so many served."""
        return _first(self.cells, after, lambda number: number >= cells)

    def with_process(self, cells: int, after: float) -> float | None:
        """Seconds after this moment until at least so many had a process."""
        return _first(self.started, after, lambda number: number >= cells)

    def back_to(self, cells: int, after: float) -> float | None:
        """Seconds after this moment until no more served, and none else had a process."""
        ends = [_first(watched, after, lambda number: number <= cells) for watched in (self.cells, self.started)]
        return max((end for end in ends if end is not None), default=None) if None not in ends else None


def _first(watched: list[tuple[float, int]], after: float, wanted: Callable[[int], bool]) -> float | None:
    return next((at - after for at, number in watched if at >= after and wanted(number)), None)


@dataclass
class Overload:
    """One cell: idle, full, ten times as many arrivals as it answers, idle again."""

    idle: list[Asked]
    full: list[Asked]
    flood: list[Asked]
    after: list[Asked]
    per_second: float
    capacity: int
    slots: int


def wave_text(wave: Wave, clients: Sequence[int], most_cells: int) -> str:
    _, burst, valley, _ = wave.marks
    rows = []
    phases = zip(("valley", "burst", "valley"), clients, pairwise(wave.marks), strict=True)
    for name, number, (began, ended) in phases:
        part = between(wave.asked, began, ended)
        firsts = [one.first - one.began for one in part if one.first is not None]
        ends = [one.latency_s for one in answered(part)]
        cells = [count for at, count in wave.cells if began <= at < ended]
        rows.append(
            [name, str(number), f"{min(cells)}–{max(cells)}", str(len(ends))]
            + [f"{quantile(firsts, share):.2f}" for share in (0.5, 0.99)]
            + [f"{quantile(ends, share):.2f}" for share in (0.5, 0.99)]
        )
    heads = ["phase", "clients", "cells", "answers", "first block p50 s", "p99 s", "whole answer p50 s", "p99 s"]
    outcomes = Counter(one.outcome for one in wave.asked)
    facts = {
        f"processes of all {most_cells} cells after the burst began": _seconds(wave.with_process(most_cells, burst)),
        "second cell serves": _seconds(wave.serving(2, burst)),
        f"all {most_cells} cells serve": _seconds(wave.serving(most_cells, burst)),
        "back to one cell after the burst ended": _seconds(wave.back_to(1, valley)),
        "requests": f"{len(wave.asked)}: {', '.join(f'{number} {name}' for name, number in outcomes.items())}",
        "streams cut": str(sum(one.is_cut for one in wave.asked)),
    }
    return f"{table(heads, rows)}\n\n{bullets(facts)}"


def overload_text(overload: Overload) -> str:
    rows = []
    for name, part in (
        ("idle", overload.idle), ("full", overload.full), ("10 ×", overload.flood), ("after", overload.after),
    ):  # fmt: skip
        ends = [one.latency_s for one in answered(part)]
        refused = sum(one.outcome == REFUSED for one in part)
        lost = len(part) - len(ends) - refused
        rows.append(
            [name, str(len(part)), str(len(ends)), f"{100 * refused / len(part):.0f} %", str(lost)]
            + [f"{quantile(ends, share):.2f}" for share in (0.5, 0.99)]
        )
    heads = ["load", "asked", "answered", "refused", "lost", "latency p50 s", "p99 s"]
    hints = [one.hint_s for one in overload.flood if one.outcome == REFUSED and one.hint_s is not None]
    refused = [one for one in overload.flood if one.outcome == REFUSED]
    told = [one.latency_s for one in refused]
    flooded = [one.latency_s for one in answered(overload.flood)]
    full = [one.latency_s for one in answered(overload.full)]
    drained = max((one.ended for one in overload.flood), default=0.0) - max(one.began for one in overload.flood)
    facts = {
        "offered": f"{overload.per_second:.1f} requests/s, ten times what the full system answered",
        "places": f"{overload.capacity} of {overload.slots} slots and what may wait",
        "p99 of accepted ÷ p99 of a full system": f"{quantile(flooded, 0.99) / quantile(full, 0.99):.2f} (aim: ≤ 2)",
        "refusals with a hint": f"{len(hints)} of {len(refused)}",
        "hints": f"{min(hints, default=0):.1f} to {max(hints, default=0):.1f} s, median {quantile(hints, 0.5):.1f} s",
        "a refusal takes": f"{quantile(told, 0.5) * 1e3:.0f} ms, p99 {quantile(told, 0.99) * 1e3:.0f} ms",
        "last accepted answer after the last arrival": f"{drained:.1f} s",
    }
    return f"{table(heads, rows)}\n\n{bullets(facts)}"


def plot(wave: Wave, path: Path) -> None:
    """Three panels over one time axis; the burst is shaded."""
    figure, (cells, queue, latency) = plt.subplots(3, 1, figsize=(8, 7), sharex=True, layout="constrained")
    start, burst, valley, end = wave.marks
    cells.step(*zip(*wave.cells, strict=True), where="post", color=_ACCENT, lw=1.5, label="serve")
    cells.step(*zip(*wave.started, strict=True), where="post", color=_INK, lw=0.8, ls=":", label="have a process")
    cells.set_ylabel("cells")
    cells.set_ylim(0, max(number for _, number in [*wave.cells, *wave.started]) + 0.5)
    cells.legend(loc="upper right", frameon=False)
    cells.set_title("A burst and a valley", loc="left")
    moments = [start + step * _STEP_S for step in range(int((end - start) / _STEP_S) + 1)]
    under_way = [sum(one.began <= at < one.ended for one in wave.asked) for at in moments]
    waiting = [sum(one.began <= at < (one.first or one.ended) for one in wave.asked) for at in moments]
    queue.fill_between(moments, under_way, color=_LIGHT, step="post", label="under way")
    queue.fill_between(moments, waiting, color=_ACCENT, step="post", label="without a first block")
    queue.set_ylabel("requests")
    queue.legend(loc="upper right", frameon=False)
    done = answered(wave.asked)
    latency.plot([one.began for one in done], [one.latency_s for one in done], ".", ms=3, color=_ACCENT, label="answer")
    firsts = [(one.began, one.first - one.began) for one in done if one.first is not None]
    latency.plot(*zip(*firsts, strict=True), ".", ms=3, color=_INK, label="first block")
    latency.set_ylabel("seconds, by when it was asked")
    latency.set_xlabel("seconds")
    latency.legend(loc="upper right", frameon=False)
    for axes in (cells, queue, latency):
        axes.axvspan(burst, valley, color="#f2efe6", zorder=-1)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _seconds(value: float | None) -> str:
    return "not seen" if value is None else f"{value:.1f} s"
