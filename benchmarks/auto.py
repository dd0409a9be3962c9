"""How near `auto` comes to the fixed mode that is best: at each number of clients, where drafts pay and where not.

Closed-loop clients of one pair in this process. `demo`: held-out prompts of the demo, whose drafts are good. `random`:
prompts of random token ids, at temperature 1, whose drafts are mostly wrong. `mixed`: both in turns. Each load has a
pair of its own. Ways take turns in each round, so that what else the machine does hits all alike; ratios are within a
round. Tokens a CPU second, of this process, are steadier where others share the machine. With --served the same clients
ask a service of its own over gRPC, in that placement; its processes' CPU time is not known.

examples:
  python -m benchmarks.auto
  python -m benchmarks.auto --rounds 1 --clients 1,4 --loads demo
  python -m benchmarks.auto --rounds 3 --loads demo,random --lossless
  python -m benchmarks.auto --rounds 3 --loads demo,random --lossless --served split
  python -m benchmarks.auto --output benchmarks/results/auto_<hardware>_<date>.md
"""

import argparse
import asyncio
import os
import shlex
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.reference.driver import Measured, drive
from benchmarks.reference.paths import InProcessPath, Running, ServedPath
from benchmarks.reference.report import bullets, setup, spread, table
from benchmarks.reference.service import started
from benchmarks.reference.workload import DEMO, Workload
from benchmarks.verified import counts
from benchmarks.verified_parts.experiment import Kept, identical
from twotower.commands.parser import count
from twotower.core import DecodingParams, Floor, Mode, Request, RequestId
from twotower.engine.settings import EngineSettings
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower

LOADS = ("demo", "random", "mixed")
_RANDOM_SEED, _TEMPERATURE = 1, 1.0


@dataclass(frozen=True, slots=True)
class Way:
    """How requests are decoded. `lossless`: the tokens are `ar`'s."""

    name: str
    params: DecodingParams
    lossless: bool = True


WAYS = (
    Way("ar", DecodingParams(Mode.AR)),
    Way("verified", DecodingParams(Mode.VERIFIED)),
    Way("auto", DecodingParams(Mode.AUTO)),
    Way("diffusion", DecodingParams(Mode.DIFFUSION), lossless=False),
    Way("auto, γ 0.8", DecodingParams(Mode.AUTO, floor=Floor.CONFIDENCE), lossless=False),
)
FIXED = {"auto": ("ar", "verified"), "auto, γ 0.8": ("ar", "verified", "diffusion")}


@dataclass(frozen=True)
class Plan:
    """`requests` of a measurement, and so many more for each client. `served`: the placement of a service, or None for
    a pair of this process.
    """

    clients: tuple[int, ...]
    loads: tuple[str, ...]
    rounds: int
    requests: int
    per_client: int
    max_new_tokens: int
    ways: tuple[Way, ...] = WAYS
    served: str | None = None

    @property
    def autos(self) -> list[str]:
        """The ways that choose, each of which has its fixed ones."""
        return [way.name for way in self.ways if way.name in FIXED]

    def requests_at(self, clients: int) -> int:
        return self.requests + self.per_client * clients

    def speed(self, run: "Run") -> float:
        """What the best mode is chosen by."""
        return run.per_second if self.served else run.per_cpu_second


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement, and the CPU seconds of this process in it."""

    measured: Measured
    cpu_s: float

    @property
    def per_second(self) -> float:
        return self.measured.tokens_per_second

    @property
    def per_cpu_second(self) -> float:
        return self.measured.num_tokens / self.cpu_s


Runs = dict[tuple[str, int, str], list[Run]]


@dataclass
class Experiment:
    """`runs`: by load, clients and way, a value a round."""

    plan: Plan
    checkpoint: Checkpoint
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])
    runs: Runs = field(default_factory=dict)

    async def run(self) -> None:
        plan = self.plan
        squares = [(clients, way) for clients in plan.clients for way in plan.ways]
        for load in plan.loads:
            async with self._target() as running:
                for number in tqdm(range(plan.rounds), desc=load, unit="round"):
                    for clients, way in squares if number % 2 == 0 else squares[::-1]:
                        run = await self._measured(Kept(running), load, clients, way, number)
                        self.runs.setdefault((load, clients, way.name), []).append(run)

    @asynccontextmanager
    async def _target(self) -> AsyncIterator[Running]:
        """What answers one load: a pair of this process, or a service that is started for it."""
        most = max(self.plan.clients)
        if self.plan.served is not None:
            settings = [f"cell.placement={self.plan.served}", f"cell.max_sequences={most}"]
            first = self.requests("demo", WAYS[0], 1, "first")[0]
            async with started(settings, first) as service, ServedPath(service.address).open() as running:
                yield running
            return
        cpu = torch.device("cpu")
        torch.set_num_threads(1)
        context = load_context_tower(self.checkpoint, cpu, torch.float32)
        denoiser = load_denoiser_tower(self.checkpoint, cpu, torch.float32)
        limits = EngineSettings(max_sequences=most, max_sequence_length=512, max_queued_requests=4 * most)
        async with InProcessPath(context, denoiser, limits, threads=1).open() as running:
            yield running

    async def _measured(self, path: Kept, load: str, clients: int, way: Way, number: int) -> Run:
        asked = self.requests(load, way, self.plan.requests_at(clients), f"{number}-{load}-{clients}-{way.name}")
        if number == 0:  # passes are recorded
            await drive(path, [], [replace(r, id=RequestId(f"{r.id}-warm")) for r in asked], clients)
        before = time.process_time()
        measured = await drive(path, [], asked, clients)
        return Run(measured, time.process_time() - before)

    def requests(self, load: str, way: Way, number: int, name: str) -> list[Request]:
        name = name.replace(" ", "").replace(",", "")
        demo, other = (self._prompts(which, number) for which in ("demo", "random"))
        kinds = {"demo": demo, "random": other, "mixed": list(chain.from_iterable(zip(demo, other, strict=True)))}
        return [
            Request(RequestId(f"{name}-{place}"), prompt, self._params(way, place, is_demo))
            for place, (prompt, is_demo) in enumerate(kinds[load][:number])
        ]

    def _prompts(self, which: str, number: int) -> list[tuple[tuple[int, ...], bool]]:
        workload = Workload(self.checkpoint, self.plan.max_new_tokens, 0.8, False, seed=_RANDOM_SEED)
        asked = workload.requests(Mode.AR, number, which)
        if which == "demo":
            return [(request.prompt_token_ids, True) for request in asked]
        ids = torch.randint(4, self.checkpoint.config.vocab_size, (number, 24), generator=torch.manual_seed(7))
        return [(tuple(row), False) for row in ids.tolist()]

    def _params(self, way: Way, place: int, is_demo: bool) -> DecodingParams:
        params = replace(way.params, max_new_tokens=self.plan.max_new_tokens, seed=place)
        return params if is_demo else replace(params, temperature=_TEMPERATURE, ignore_eos=True)


def render(experiment: Experiment, command: str) -> str:
    """The whole report."""
    plan = experiment.plan
    lines = {
        "target": f"a service of its own, `{plan.served}`, over gRPC" if plan.served else "a pair in this process",
        "requests": f"{plan.requests} and {plan.per_client} for each client; {plan.rounds} rounds, ways in turns",
        "decoding": f"at most {plan.max_new_tokens} tokens, block 16; demo: greedy, to EOS; random: temperature "
        f"{_TEMPERATURE:g}, EOS ignored; diffusion: γ 0.8",
    }
    parts = [
        "# `auto` beside fixed modes",
        setup(experiment.load_before, command) + "\n" + bullets(lines),
        "## Tokens a second\n\n" + _throughput(experiment),
        "## `auto` over the best fixed mode\n\n" + _ratios(experiment),
    ]
    return "\n\n".join(parts) + "\n"


def _points(experiment: Experiment) -> list[tuple[str, int]]:
    return [(load, clients) for load in experiment.plan.loads for clients in experiment.plan.clients]


def _throughput(experiment: Experiment) -> str:
    rows = []
    for load, clients in _points(experiment):
        of = {way.name: experiment.runs[load, clients, way.name] for way in experiment.plan.ways}
        same, number = identical(*([run.measured for run in of[name]] for name in ("auto", "ar")))
        speeds = [spread([run.per_second for run in runs], 0) for runs in of.values()]
        rows.append([load, str(clients), *speeds, f"{same} of {number}"])
    head = ["load", "clients", *(way.name for way in experiment.plan.ways), "auto's answers as ar"]
    return table(head, rows) + "\n\nMedian over the rounds, smallest to largest in brackets."


def _ratios(experiment: Experiment) -> str:
    rows = []
    for load, clients in _points(experiment):
        cells = []
        for auto in experiment.plan.autos:
            fixed = FIXED[auto]
            of = {name: experiment.runs[load, clients, name] for name in (auto, *fixed)}
            speeds = {name: statistics.median(map(experiment.plan.speed, of[name])) for name in fixed}
            best = max(fixed, key=lambda name: speeds[name])
            pairs = list(zip(of[auto], of[best], strict=True))
            cells += [best, spread([a.per_second / b.per_second for a, b in pairs], 2)]
            if not experiment.plan.served:
                cells.append(spread([a.per_cpu_second / b.per_cpu_second for a, b in pairs], 2))
        rows.append([load, str(clients), *cells])
    heads = {"auto": "best lossless", "auto, γ 0.8": "best of all"}
    by_cpu = () if experiment.plan.served else ("by CPU time",)
    columns = [(heads[auto], f"{auto} ÷ best", *by_cpu) for auto in experiment.plan.autos]
    told = table(["load", "clients", *chain.from_iterable(columns)], rows)
    return told + f"\n\nThe best by the median of tokens a {'CPU ' if by_cpu else ''}second; within a round."


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = _parser().parse_args(arguments)
    plan = Plan(
        options.clients, tuple(options.loads.split(",")), options.rounds, options.requests, options.per_client,
        options.max_new_tokens, tuple(way for way in WAYS if way.lossless or not options.lossless),
        options.served,
    )  # fmt: skip
    experiment = Experiment(plan, Checkpoint.open(DEMO))
    asyncio.run(experiment.run())
    command = shlex.join(["python", "-m", "benchmarks.auto", *(arguments or sys.argv[1:])])
    report = render(experiment, command)
    print(report)
    if options.output is not None:
        options.output.write_text(report, encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.auto", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--clients", type=counts, default=(1, 4, 16, 64), metavar="N,M", help="at once (1,4,16,64)")
    add("--loads", default=",".join(LOADS), help="(%(default)s)")
    add("--rounds", type=count, default=5, help="each way once in each (%(default)s)")
    add("--requests", type=count, default=16, help="of each measurement (%(default)s)")
    add("--per-client", type=count, default=2, help="and more for each client (%(default)s)")
    add("--max-new-tokens", type=count, default=64, help="(%(default)s)")
    add("--lossless", action="store_true", help="only ways that give ar's tokens")
    add("--served", choices=["split", "colocated"], help="through gRPC, of a service in this placement")
    add("--output", type=Path, metavar="FILE.md", help="write the report there")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
