"""The result as markdown: what ran where, then the tables. A median with the smallest and largest in brackets."""

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.reference.driver import Measured
from benchmarks.reference.experiment import Cell, Experiment, Plan
from benchmarks.reference.forwards import FAIR
from benchmarks.reference.workload import Workload

_ROOT = Path(__file__).resolve().parents[2]


def render(experiment: Experiment, command: str) -> str:
    """The whole report."""
    parts = [
        "# Naive loop, in-process pair, served path",
        setup(experiment.load_before, command),
        _config(experiment.plan, experiment.workload),
        _threads(experiment),
        _forwards(experiment),
        _throughput(experiment),
        _cold_start(experiment),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`median (smallest–largest)`."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def setting(load_before: float, command: str) -> dict[str, str]:
    """Where and with what this ran."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB, {_gpu()}",
        "load average over a minute": f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} at the end",
        "software": ", ".join([f"Python {platform.python_version()}", *_versions("torch", "ray", "grpcio")]),
        "commit": commit(),
        "command": f"`{command}`",
    }


def setup(load_before: float, command: str) -> str:
    """The same as a list."""
    return bullets(setting(load_before, command))


def _config(plan: Plan, workload: Workload) -> str:
    config = workload.checkpoint.config
    shape = f"`{config.hybrid_override_pattern}`, hidden {config.hidden_size}, vocabulary {config.vocab_size}, float32"
    stop = "EOS ignored" if workload.ignore_eos else "stops at EOS"
    requests = ", ".join(f"{plan.requests_at(c)} at {c}" for c in plan.concurrency)
    lines = {
        "checkpoint": f"{'demo' if workload.is_demo else workload.checkpoint.directory.name} ({shape})",
        "prompts": workload.prompts,
        "decoding": f"greedy, block 16, 16 steps per block, γ {workload.confidence_threshold:g}, "
        f"at most {workload.max_new_tokens} new tokens, {stop}",
        "requests by concurrency": f"{requests}; {plan.repeats} rounds, paths interleaved",
        "service settings": ", ".join(["cell.placement=split", *plan.service_settings]),
    }
    return "## Configuration\n\n" + bullets(lines)


def _threads(experiment: Experiment) -> str:
    results = experiment.results
    chosen = ", ".join(f"{path} {threads}" for path, threads in results.threads.items())
    text = f"## CPU threads\n\nIntra-op threads used: {chosen or 'the default'} (the service sets its own)."
    if results.threads_tried:
        tried = "; ".join(f"{path} with {n}: {s:.2f} s" for (path, n), s in results.threads_tried.items())
        text += f" Tried on the same requests (what is slower was cut short): {tried}."
        text += " One thread, unless more take 10 % less."
    return text


def _forwards(experiment: Experiment) -> str:
    rows = [
        [t.name, str(t.cached), *(f"{s * 1e3:.2f}" for s in (t.ours_s, t.naive_s, t.recorded_s)), f"{t.ratio:.2f}"]
        for t in experiment.results.forwards
    ]
    worst = max(t.ratio for t in experiment.results.forwards)
    verdict = "as wanted" if worst <= FAIR else "MORE than wanted: the baseline is not fair"
    head = ["pass", "tokens cached", "ours, ms", "naive, ms", "ours recorded, ms", "naive ÷ ours"]
    return (
        "## Tower passes at batch 1\n\n"
        + table(head, rows)
        + f"\n\nMedians. Worst ratio {worst:.2f}, wanted at most {FAIR}: {verdict}. Both of these are eager. Engines "
        "on a CPU replay recorded passes (docs/adr/0006); the naive loop has no such trick, and `in_process_eager` "
        "does without too."
    )


def _throughput(experiment: Experiment) -> str:
    plan, runs = experiment.plan, experiment.results.runs
    rows = []
    for mode in plan.modes:
        for concurrency in plan.concurrency:
            naive = runs.get(Cell(mode, concurrency, "naive"))
            for path in plan.paths:
                measured = runs[Cell(mode, concurrency, path)]
                rows.append([str(mode), str(concurrency), path, *_cells(measured, naive)])
    head = [
        "mode", "concurrency", "path", "tokens/s", "÷ naive", "first tokens, ms", "between blocks, ms", "tokens/step",
        "answers as naive",
    ]  # fmt: skip
    return (
        "## Throughput\n\n"
        + table(head, rows)
        + "\n\nTokens a client receives, over the time from the first request to the last answer. `÷ naive` compares "
        "runs of the same round. `first tokens` includes waiting for one's turn. `between blocks` is between tokens "
        "in `ar`. `answers as naive`: requests whose tokens equal the naive loop's."
    )


def _cells(measured: list[Measured], naive: list[Measured] | None) -> list[str]:
    cells = [spread([m.tokens_per_second for m in measured], 0)]
    if naive is None:
        cells.append("–")
    else:
        pairs = zip(measured, naive, strict=True)
        cells.append(spread([m.tokens_per_second / n.tokens_per_second for m, n in pairs], 2))
    cells.append(spread([m.first_token_s * 1e3 for m in measured]))
    cells.append(_optional((m.between_blocks_s for m in measured), lambda s: s * 1e3))
    cells.append(_optional((m.tokens_per_step for m in measured), lambda value: value))
    cells.append("–" if naive is None else _same_answers(measured, naive))
    return cells


def _optional(values: Iterable[float | None], scale: Callable[[float], float]) -> str:
    known = [scale(value) for value in values if value is not None]
    return f"{statistics.median(known):.2f}" if known else "–"


def _same_answers(measured: list[Measured], naive: list[Measured]) -> str:
    pairs = [
        (a.token_ids, b.token_ids)
        for m, n in zip(measured, naive, strict=True)
        for a, b in zip(m.answers, n.answers, strict=True)
    ]
    return f"{sum(ours == theirs for ours, theirs in pairs)} of {len(pairs)}"


def _cold_start(experiment: Experiment) -> str:
    services = experiment.results.cold_starts
    if not services:
        return ""
    return (
        "## Cold start\n\n`python -m cluster up`, environment made, files in the page cache: SERVING after "
        f"{spread([s.healthy_s for s in services])} s, first token after "
        f"{spread([s.first_token_s for s in services])} s. `make serve` runs the same after checking the environment."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(lines: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _versions(*names: str) -> Iterable[str]:
    for name in names:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue


def commit() -> str:
    """What is checked out, and whether it was changed since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    dirty = " with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + dirty


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
