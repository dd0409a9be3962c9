"""What runs came to, as markdown."""

from collections import Counter
from collections.abc import Sequence

from benchmarks.reference.report import setup
from benchmarks.simulate_parts.lengths import LENGTHS
from benchmarks.simulate_parts.router import Outcome
from benchmarks.simulate_parts.scenarios import Ran, Scale
from twotower.commands.bench.figures import Distribution

_HEAD = (
    "scenario",
    "routers",
    "requests",
    "not answered",
    "tokens/s",
    "first token p50 / p99, s",
    "whole answer p50 / p99, s",
    "longest gap of an answer, p99 / most, s",
    "moved / resumed",
    "cells least–most",
    "rows a pass",
    "most in a cell",
    "devices busy",
    "busiest router",
)


def render(scale: Scale, found: Sequence[Ran], command: str, load_before: float, picture: str | None) -> str:
    parts = [
        "# A cluster, simulated",
        setup(load_before, command),
        "\n".join(_setting(scale, found)),
        "\n".join(
            f"- {name}: {what}." for name, what in {one.scenario.name: one.scenario.what for one in found}.items()
        ),
        "\n".join(_table(found)),
        "\n".join(_kept(found)),
    ]
    return "\n\n".join([*parts, *([f"![Each scenario over time]({picture})"] if picture else [])])


def _setting(scale: Scale, found: Sequence[Ran]) -> list[str]:
    towers = f"{scale.denoisers} denoisers a context tower" if scale.denoisers else "both towers on one device"
    return [
        "- Nothing here was measured on the machines that it is about. It is a model; "
        "[what is in it](../../docs/adr/0044-simulation.md).",
        f"- {scale.cells} cells, {towers}; {60 * scale.rate:g} requests a minute for {scale.seconds:g} s; "
        f"seed {scale.seed}; settings: {' '.join(scale.settings) or 'the defaults'}",
        f"- passes: {found[0].source}; {scale.tokens_per_step:g} tokens a step; `diffusion`, no prefix cache",
        f"- lengths: {LENGTHS[scale.lengths].source}",
        f"- a router's interpreter: {1e3 * scale.request_s:.2f} ms a request and {1e3 * scale.event_s:.2f} ms an event "
        "(watching_cpu_2026-11-29.md: 6.25 ms of `diffusion` with 4 events, 10.73 ms of `ar`, which has some 30)",
        f"- a cell starts in {scale.start_s:g} s; half a millisecond from one process to another",
    ]


def _table(found: Sequence[Ran]) -> list[str]:
    rows = [f"| {' | '.join(_HEAD)} |", "|" + "---|" * len(_HEAD)]
    return [*rows, *(f"| {' | '.join(_row(one))} |" for one in found)]


def _row(ran: Ran) -> list[str]:
    result, good = ran.result, [one for one in ran.result.outcomes if one.error is None]
    during = [moment for moment in result.moments if moment.at <= ran.until] or result.moments
    cells = [moment.cells for moment in during]
    first = Distribution.of(one.first - one.due for one in good if one.first is not None)
    whole, gaps = Distribution.of(one.latency_s for one in good), Distribution.of(one.gap_s for one in good)
    return [
        ran.scenario.name, str(ran.routers), str(len(result.outcomes)), _failed(result.outcomes),
        f"{sum(one.tokens for one in good) / max(result.seconds, 1e-9):.0f}",
        f"{first.p50:.2f} / {first.p99:.2f}", f"{whole.p50:.2f} / {whole.p99:.2f}", f"{gaps.p99:.2f} / {gaps.most:.2f}",
        f"{sum(one.moves for one in result.outcomes)} / {sum(one.resumes for one in result.outcomes)}",
        f"{min(cells)}–{max(cells)}", f"{_mean([moment.rows for moment in during]):.2f}",
        str(max(moment.most_rows for moment in during)), f"{100 * _mean([moment.busy for moment in during]):.0f} %",
        f"{100 * _mean([moment.router for moment in during]):.0f} %",
    ]  # fmt: skip


def _failed(outcomes: Sequence[Outcome]) -> str:
    errors = Counter(one.error for one in outcomes if one.error is not None)
    return ", ".join(f"{number} {name}" for name, number in sorted(errors.items())) or "0"


def _kept(found: Sequence[Ran]) -> list[str]:
    """What must be nothing."""
    leaks = Counter[str]()
    for one in found:
        leaks.update({name: number for name, number in one.result.left.items() if number})
    told = ", ".join(f"{number} {name}" for name, number in leaks.items())
    cut = sum(one.result.cuts for one in found)
    return [f"- left after the last request, which has to be nothing: {told or 'nothing'}", f"- cut by a drain: {cut}"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
