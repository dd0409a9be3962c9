"""The model beside a service of the demo on this machine: `twotower bench`'s load, and the same requests in the model.

The model's inputs are measured in three places; nothing else is fitted:
- with one client: the times of a request beside its passes, of a step, of a commit (least squares over its answers);
- in this process, without a service: how much longer a pass takes with more rows than with one;
- under each load: the CPU time of router, cell and client a request. They share the core that the towers leave.
"""

import argparse
import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch

from benchmarks.reference.report import setup
from benchmarks.simulate_parts.clock import simulated
from benchmarks.simulate_parts.costs import Line, MeasuredCosts
from benchmarks.simulate_parts.lengths import Asked, blocks_of, spread
from benchmarks.simulate_parts.router import Outcome, RouterCosts
from benchmarks.simulate_parts.serve import Pace
from benchmarks.simulate_parts.simulation import Cluster, Result, Setting
from benchmarks.verified_parts.bare import COMMIT, STEP, Bare
from cluster.config import load_config
from cluster.served_paths import checkpoint_directory
from twotower.commands.bench.arguments import add_bench_arguments, plan_of
from twotower.commands.bench.command import Bench
from twotower.commands.bench.figures import Distribution
from twotower.commands.bench.prompts import demo_prompts
from twotower.commands.bench.samples import Pass, Sample
from twotower.errors import ConfigError
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower

WITHIN = 0.15
_ROWS, _REPETITIONS, _WARM_UP = (1, 2, 4, 8, 16, 32), 60, 128
_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Watched:
    """A load on the service, and the CPU seconds that all but its towers spent on it, the client's own among them."""

    clients: int
    run: Pass
    beside_s: float

    @property
    def beside_each_s(self) -> float:
        return self.beside_s / max(1, len(self.run.good))


@dataclass(frozen=True, slots=True)
class Fitted:
    """Of one client's answers, in seconds. `beside`: all of a request but steps and commits; its prompt is in it."""

    beside: float
    step: float
    commit: float
    off: float


@dataclass(frozen=True, slots=True)
class Beside:
    """One load: the service's figures and the model's."""

    clients: int
    tokens_per_s: tuple[float, float]
    p50: tuple[float, float]
    p99: tuple[float, float]

    @property
    def holds(self) -> bool:
        return all(abs(model / service - 1) <= WITHIN for service, model in (self.tokens_per_s, self.p99))


@dataclass(frozen=True, slots=True)
class Validation:
    url: str
    fitted: Fitted
    rows: dict[str, Line]
    beside: tuple[Beside, ...]
    watched: tuple[Watched, ...]

    def text(self, command: str) -> str:
        """As markdown."""
        each = ", ".join(f"{1e3 * one.beside_each_s:.2f} ms by {one.clients}" for one in self.watched)
        growth = "; ".join(
            f"{name}: " + ", ".join(f"{seconds:.2f} × at {rows:g}" for rows, seconds in line.points[1:])
            for name, line in self.rows.items()
        )
        fitted = self.fitted
        head = (
            "| clients | tokens/s: service | model | ratio | p50, ms | model | p99, ms | model | ratio | within 15 % |"
        )
        rows = [head, "|" + "---|" * 10, *map(_row, self.beside)]
        held = sum(one.holds for one in self.beside)
        return "\n\n".join([
            "# The model beside the service", setup(0.0, command),
            f"- service: {self.url}; `diffusion`, the demo's held-out prompts, `twotower bench`'s closed loop\n"
            f"- by one client: {1e3 * fitted.beside:.2f} ms a request, {1e3 * fitted.step:.2f} ms a step, "
            f"{1e3 * fitted.commit:.2f} ms a commit (an answer is {1e3 * fitted.off:.2f} ms off that, by the median)\n"
            f"- bare passes by rows, over one row's: {growth}\n- CPU of router, cell and client a request: {each}",
            "\n".join(rows), f"Throughput and p99 within 15 %: {held} of {len(self.beside)} loads.",
        ])  # fmt: skip

    def plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, 2), ("tokens_per_s", "p99"), strict=True):
            clients = [one.clients for one in self.beside]
            for place, told in enumerate(("service", "model")):
                axes.plot(
                    clients, [getattr(one, name)[place] for one in self.beside], "o-x-"[2 * place :][:2], label=told
                )
            axes.set(xscale="log", xlabel="clients", ylabel=name.replace("_", " "), ylim=(0, None))
            axes.set_xticks(clients, [str(number) for number in clients])
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        figure.savefig(path, dpi=110)


def _row(one: Beside) -> str:
    (served, model), p50, p99 = one.tokens_per_s, one.p50, one.p99
    cells = [
        str(one.clients), f"{served:.0f}", f"{model:.0f}", f"{model / served:.2f}", f"{1e3 * p50[0]:.1f}",
        f"{1e3 * p50[1]:.1f}", f"{1e3 * p99[0]:.1f}", f"{1e3 * p99[1]:.1f}", f"{p99[1] / p99[0]:.2f}",
        "yes" if one.holds else "no",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def validate(
    url: str, clients: Sequence[int], requests: int, seed: int, settings: Sequence[str], rows: Sequence[int] = _ROWS
) -> Validation:
    """Raises ConfigError for a service elsewhere, and what `bench` raises."""
    if urlsplit(url).hostname not in _LOCAL:
        raise ConfigError(
            f"--validate: got {url}, wanted a service on this machine: the CPU time of its processes counts"
        )
    grown = passes_by_rows(rows)
    _load(url, min(16, max(clients)), min(_WARM_UP, requests), seed)
    alone = _load(url, 1, requests, seed)
    watched = tuple(alone if number == 1 else _load(url, number, requests, seed) for number in clients)
    fitted = fit(alone.run.good)
    beside = tuple(_beside(one, modelled(one, fitted, grown, settings, seed)) for one in watched)
    return Validation(url, fitted, grown, beside, watched)


def passes_by_rows(rows: Sequence[int]) -> dict[str, Line]:
    """Of the demo's towers here, with what each pass decides: seconds over those of one row."""
    torch.set_num_threads(1)
    checkpoint, device = Checkpoint.open(checkpoint_directory("demo")), torch.device("cpu")
    context, denoiser = (
        load(checkpoint, device, torch.float32, False) for load in (load_context_tower, load_denoiser_tower)
    )
    bare = Bare(context, denoiser, [list(range(10, 26))] * max(rows))  # type: ignore[arg-type]
    seconds = [bare.seconds(number, _REPETITIONS, (STEP, COMMIT)) for number in rows]
    first = seconds[0].of
    return {
        kind: Line(tuple((one.rows, max(1.0, one.of[kind] / first[kind])) for one in seconds))
        for kind in (STEP, COMMIT)
    }


def fit(samples: Sequence[Sample]) -> Fitted:
    """Least squares over the nine tenths that are nearest to it: what the machine did besides is no cost of ours."""
    latency = np.array([one.latency_s for one in samples])
    counted = np.array([(1.0, one.usage.num_steps, one.usage.num_blocks - 1) for one in samples])
    keep = np.ones(len(samples), dtype=bool)
    for _ in range(3):
        found, *_ = np.linalg.lstsq(counted[keep], latency[keep], rcond=None)
        off = np.abs(counted @ found - latency)
        keep = off <= np.quantile(off, 0.9)
    beside, step, commit = (max(0.0, float(value)) for value in found)
    return Fitted(beside, step, commit, float(np.median(off)))


def modelled(watched: Watched, fitted: Fitted, rows: dict[str, Line], settings: Sequence[str], seed: int) -> Result:
    """The same requests in the model, by as many clients."""
    # A prompt is read by a pass of the context tower as a block is: it is on the device, not beside it.
    prompt = min(fitted.commit, fitted.beside) if fitted.commit else 0.0
    beside = fitted.beside - prompt
    on_path = min(beside, watched.beside_each_s)
    costs = RouterCosts(on_path, 0.0, watched.beside_each_s - on_path, beside - on_path)
    own = ["cell.device=cpu", "cell.placement=colocated", "cluster.num_routers=1"]
    setting = Setting(
        load_config(None, [*own, *settings]),
        _DemoCosts(fitted, rows, prompt),
        router_costs=costs,
        pace=Pace(hop_s=0.0),
        callers=1,
        most_tokens=128,
    )
    asked = list(_asked(watched.run.good))

    async def work() -> Result:
        return await Cluster(setting, seed).closed_loop(watched.clients, asked)

    return simulated(work())


def _asked(samples: Sequence[Sample]) -> Iterator[Asked]:
    for one in samples:
        usage, blocks = one.usage, max(1, blocks_of(one.usage.completion_tokens))
        yield Asked(max(1, usage.prompt_tokens), max(1, usage.completion_tokens), spread(usage.num_steps, blocks))


class _DemoCosts(MeasuredCosts):
    """By rows as bare passes grow, at one row as the service's own answers tell."""

    def __init__(self, fitted: Fitted, rows: dict[str, Line], prompt_s: float) -> None:
        steps, reads = ({number: by * value for number, by in rows[kind].points} for kind, value in (
            (STEP, fitted.step), (COMMIT, fitted.commit)
        ))  # fmt: skip
        super().__init__(steps, reads, prompt_s, 0.0, "measured on this machine")
        self._grows = rows[COMMIT]

    def prompt(self, rows: int, width: int) -> float:
        return self._prompt_s * self._grows.at(rows * max(1.0, width / 16))


def _beside(watched: Watched, model: Result) -> Beside:
    good = [one for one in model.outcomes if one.error is None]
    service, ours = Distribution.of(one.latency_s for one in watched.run.good), _latencies(good)
    tokens = sum(one.tokens for one in good) / max(max((one.end for one in good), default=0.0), 1e-9)
    rate = watched.run.tokens_per_s
    return Beside(watched.clients, (rate, tokens), (service.p50, ours.p50), (service.p99, ours.p99))


def _latencies(good: Sequence[Outcome]) -> Distribution:
    return Distribution.of(one.latency_s for one in good)


def _load(url: str, clients: int, requests: int, seed: int) -> Watched:
    parser = argparse.ArgumentParser()
    add_bench_arguments(parser)
    words = ["--url", url, "--mode", "diffusion", "--clients", str(clients), "--requests", str(requests)]
    plan = plan_of(parser.parse_args([*words, "--seed", str(seed), "--warm-up", "0"]))
    before = _cpu_beside_towers()
    run = asyncio.run(Bench(plan, demo_prompts(None, plan.seed)).run())
    [told] = run.passes
    return Watched(clients, told, _cpu_beside_towers() - before + told.client_cpu_s)


def _cpu_beside_towers() -> float:
    """Of routers and cells on this machine: towers have processes of their own. Raises ConfigError without any."""
    seconds, found = 0.0, 0
    for process in psutil.process_iter(["name", "cmdline"]):
        title = " ".join(process.info["cmdline"] or [process.info["name"] or ""])
        if title.startswith("ray::ServeReplica"):
            with suppress(psutil.Error):
                times = process.cpu_times()
                seconds, found = seconds + times.user + times.system, found + 1
    if not found:
        raise ConfigError("--validate: found no process of Ray Serve, wanted a service on this machine")
    return seconds
