"""A run as a table for a terminal, as markdown, as JSON."""

import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import twotower
from twotower.commands.bench.arguments import Plan
from twotower.commands.bench.figures import Distribution, Figures, Spread
from twotower.commands.bench.load import MAX_REQUESTS
from twotower.commands.bench.samples import Pass
from twotower_client import ModelInfo

FORMAT = 1
_COLUMNS = (
    ("tokens/s", ""),
    ("requests/s", ""),
    ("first token", "ms, p50 / p99"),
    ("between blocks", "ms, p50 / p99"),
    ("latency", "ms, p50 / p90 / p99"),
    ("tokens/step", ""),
    ("accepted/round", ""),
)
_HEAD, _UNDER = zip(("", ""), *_COLUMNS, strict=True)
_CPU = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured, where, and the results."""

    plan: Plan
    model: ModelInfo
    began: str
    seconds: float
    load_before: tuple[float, float, float]
    figures: Sequence[Figures]
    passes: Sequence[Pass]

    def as_json(self) -> dict[str, Any]:
        plan = {**asdict(self.plan), "params": {str(mode): told for mode, told in self.plan.params.items()}}
        paths: dict[str, Any] = {name: plan[name] and str(plan[name]) for name in ("prompts", "output")}
        paths["tls"] = [path and str(path) for path in self.plan.tls]
        return {
            "format": FORMAT,
            "setting": dict(self.setting()),
            "plan": {**plan, **paths},
            "model": {**asdict(self.model), "defaults": dict(self.model.defaults or {})},
            "figures": [{**one.as_json(), **_per_device(one, self.plan.devices)} for one in self.figures],
            "passes": [
                {
                    "mode": one.mode,
                    "load": one.load.name,
                    "round": one.round,
                    "seconds": one.seconds,
                    "samples": [sample.as_json() for sample in one.samples],
                }
                for one in self.passes
            ],
        }

    def setting(self) -> list[tuple[str, str]]:
        """What a result must state."""
        plan, model, load = self.plan, self.model, self.plan.loads[0]
        before, after = self.load_before[0], os.getloadavg()[0]
        ends = [f"{load.requests} requests"] if load.requests is not None else []
        ends += [f"{load.seconds:g} s"] if load.seconds is not None else []
        warm_up = " or ".join(dict.fromkeys(str(plan.warm_ups(one)) for one in plan.loads))
        rounds = f"{plan.rounds} round" + ("" if plan.rounds == 1 else "s")
        each = f"{' or '.join(ends)}, after {warm_up} to warm up; {rounds}; seed {plan.seed}"
        machine = f"{_cpu_name()}, {os.cpu_count()} cores, load {before:.2f} before, {after:.2f} after"
        return [
            ("service", f"{plan.url}, version {model.version or 'not told'}"),
            ("model", f"{model.name} ({model.checkpoint_fingerprint})"),
            ("prompts", str(plan.prompts) if plan.prompts else f"the demo's held-out {plan.family or 'tasks'}"),
            ("loop", "open: latency counts from when a request was due" if load.rate else "closed"),
            ("each pass", each),
            ("parameters", self._parameters()),
            ("load's machine", machine),
            ("versions", f"twotower {twotower.__version__} at {_commit()}, Python {platform.python_version()}"),
            ("began", f"{self.began}, took {self.seconds:.0f} s"),
            ("command", f"python -m twotower {shlex.join(sys.argv[1:])}"),
        ]

    def _parameters(self) -> str:
        given = {name: value for told in self.plan.params.values() for name, value in told.items() if name != "mode"}
        told = [f"{name} {value}" for name, value in given.items() if (name, value) != ("priority", 0)]
        return ", ".join(told) or "the service's"

    def text(self) -> str:
        """The report for a terminal."""
        told = dict(self.setting())
        parts = [f"{told['model']} at {self.plan.url}; {told['prompts']}; {told['each pass']}"]
        for load in dict.fromkeys(one.load for one in self.figures):
            rows = [_row(one, self.plan.devices) for one in self.figures if one.load == load]
            parts.append(_aligned([(load, *_HEAD[1:]), _UNDER, *rows]))
        return "\n\n".join(parts) + "".join(f"\n{note}" for note in self.notes())

    def markdown(self) -> str:
        lines = ["# Load on a service", "", *(f"- {name}: {told}" for name, told in self.setting()), ""]
        for load in dict.fromkeys(one.load for one in self.figures):
            head = [f"{name} {under}".strip() for name, under in zip((load, *_HEAD[1:]), _UNDER, strict=True)]
            lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
            lines += [f"| {' | '.join(_row(one, self.plan.devices))} |" for one in self.figures if one.load == load]
            lines.append("")
        return "\n".join([*lines, *(f"{note}\n" for note in self.notes()), _MEANING])

    def notes(self) -> list[str]:
        """What a reader of the table must know."""
        notes = []
        for one in self.figures:
            name = f"{one.mode}, {one.load}"
            if one.failed:
                told = ", ".join(f"{count} {code}" for code, count in one.errors.items())
                notes.append(f"{name}: {one.failed} of {one.requests} requests failed: {told}")
            if self.plan.loads[0].requests is None and one.requests >= MAX_REQUESTS * one.rounds:
                notes.append(f"{name}: ended before its time, after {MAX_REQUESTS} requests a pass")
            if one.client_cpu_share > 0.8:
                notes.append(
                    f"{name}: the load's own process used {one.client_cpu_share:.2f} of a core, and may be the limit"
                )
            if one.sent_late.count and one.sent_late.p99 > 0.01:
                notes.append(f"{name}: requests were sent late, p99 {_ms(one.sent_late.p99)} ms; latencies count that")
        return notes


_MEANING = """Rates are over a pass's whole time, the end of its last answers included; with several rounds their mean
and range. Times are over all rounds' samples: to the first tokens, between blocks (in `ar` tokens, which a busy service
sends several at a time), and to the end. Tokens a step and accepted drafts a round are over whole blocks. Requests that
failed count in no time and no rate."""


def _row(one: Figures, devices: int | None) -> tuple[str, ...]:
    per_device = f", {_number(one.tokens_per_s.mean / devices)} a device" if devices else ""
    return (
        one.mode,
        _spread(one.tokens_per_s) + per_device,
        _spread(one.requests_per_s),
        _times(one.first_token, "p50", "p99"),
        _times(one.between_blocks, "p50", "p99"),
        _times(one.latency, "p50", "p90", "p99"),
        _or_dash(one.tokens_per_step),
        _or_dash(one.accepted_per_round),
    )


def _per_device(one: Figures, devices: int | None) -> dict[str, float]:
    return {"tokens_per_s_per_device": one.tokens_per_s.mean / devices} if devices else {}


def _spread(told: Spread) -> str:
    if told.low == told.high:
        return _number(told.mean)
    return f"{_number(told.mean)} ({_number(told.low)}–{_number(told.high)})"


def _number(value: float) -> str:
    """The number with about three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _times(told: Distribution, *names: str) -> str:
    return " / ".join(_ms(getattr(told, name)) for name in names) if told.count else "–"


def _ms(seconds: float) -> str:
    value = seconds * 1000
    return "–" if math.isnan(value) else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        shown = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *shown]).rstrip())
    return "\n".join(lines)


def _cpu_name() -> str:
    """As Linux tells it."""
    try:
        told = _CPU.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The commit of the checkout that runs."""
    here = Path(twotower.__file__).parent
    try:
        told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "no checkout"
    return told.stdout.strip() or "no checkout"
