"""How much faster than a naive loop: the same requests through three paths, in one run.

  naive       the released script's structure: one request after the other, one tower at a time, no engine
  in_process  a pair of engines in this process (twotower.engine.in_process)
  served      a service of its own (python -m cluster up, split placement), asked over gRPC

FROZEN, with benchmarks/reference/naive_loop.py: later results are divided by this baseline.

The report first shows what makes the naive loop a fair baseline: its bare tower passes take about as long as ours.
Then come tokens per second of every path at every concurrency, with ratios, and the cold start of the service.
The demo checkpoint is asked questions of its own corpus and stops at EOS. Any other checkpoint gets random token ids
and decodes to the length limit: timings hold, the text means nothing.

examples:
  python -m benchmarks.reference_loop                                        all of it
  python -m benchmarks.reference_loop --quick --paths naive,in_process       a first look, no service
  python -m benchmarks.reference_loop --checkpoint tests/golden/tt_moe --output result.md
"""

import argparse
import asyncio
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.reference.experiment import PATHS, Experiment, Plan
from benchmarks.reference.report import render
from benchmarks.reference.workload import DEMO, Workload
from twotower.commands.parser import count
from twotower.core import Mode
from twotower.errors import TwoTowerError
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower

_BLOCK = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit status 2 on bad arguments or a checkpoint that cannot be read."""
    options = _parser().parse_args(arguments)
    try:
        experiment = _experiment(options)
    except TwoTowerError as error:
        print(f"reference_loop: {error}", file=sys.stderr)
        return 2
    asyncio.run(experiment.run())
    command = shlex.join(["python", "-m", "benchmarks.reference_loop", *(arguments or sys.argv[1:])])
    report = render(experiment, command)
    if options.output is None:
        print(report)
    else:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report, encoding="utf-8")
        print(f"written to {options.output}")
    return 0


def _experiment(options: argparse.Namespace) -> Experiment:
    checkpoint = Checkpoint.open(DEMO if options.checkpoint == "demo" else Path(options.checkpoint).resolve())
    cpu = torch.device("cpu")
    context = load_context_tower(checkpoint, cpu, torch.float32, progress=True)
    denoiser = load_denoiser_tower(checkpoint, cpu, torch.float32, progress=True)
    ignore_eos = options.ignore_eos or checkpoint.directory != DEMO
    workload = Workload(checkpoint, options.max_new_tokens, options.confidence_threshold, ignore_eos, options.seed)
    return Experiment(_plan(options), workload, context, denoiser)


def _plan(options: argparse.Namespace) -> Plan:
    plan = Plan(
        paths=options.paths,
        modes=options.modes,
        concurrency=options.concurrency,
        requests=options.requests,
        repeats=options.repeats,
        threads=options.threads,
        service_settings=tuple(options.set),
    )
    if options.quick:
        few = tuple(c for c in plan.concurrency if c <= 4) or plan.concurrency[:1]
        return replace(
            plan, concurrency=few, requests=4, per_client=3, repeats=1, forward_lengths=(32,), forward_repetitions=10
        )
    return plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reference_loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", default="demo", metavar="demo|DIR", help="two-tower checkpoint (demo)")
    add("--paths", type=_paths, default=PATHS, metavar="A,B", help=f"of {','.join(PATHS)} (all)")
    add("--modes", type=_modes, default=(Mode.DIFFUSION, Mode.AR), metavar="A,B", help="(diffusion,ar)")
    add("--concurrency", type=_counts, default=(1, 4, 16), metavar="N,M", help="clients at once (1,4,16)")
    add("--requests", type=count, default=64, help="of each run; at least 8 for each client (%(default)s)")
    add("--repeats", type=count, default=3, help="rounds over all paths (%(default)s)")
    add("--max-new-tokens", type=_whole_blocks, default=48, help=f"a multiple of {_BLOCK} (%(default)s)")
    add("--confidence-threshold", type=_share, default=0.8, help="γ of diffusion (%(default)s)")
    add("--ignore-eos", action="store_true", help="decode the demo checkpoint to the length limit too")
    add("--threads", type=count, help="of both local paths (1, or torch's default where that is clearly faster)")
    add("--seed", type=int, default=0, help="of the prompts (%(default)s)")
    add("--set", action="append", default=[], metavar="A.B=C", help="a setting of the service; may be repeated")
    add("--quick", action="store_true", help="one short round at concurrency up to 4")
    add("--output", type=Path, metavar="FILE.md", help="write the report there instead of printing it")
    return parser


def _paths(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if not chosen or set(chosen) - set(PATHS):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted some of {','.join(PATHS)}")
    return tuple(path for path in PATHS if path in chosen)


def _modes(text: str) -> tuple[Mode, ...]:
    try:
        return tuple(Mode(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted some of {','.join(Mode)}") from None


def _counts(text: str) -> tuple[int, ...]:
    return tuple(count(word) for word in text.split(","))


def _whole_blocks(text: str) -> int:
    if count(text) % _BLOCK:
        raise argparse.ArgumentTypeError(
            f"got {text}, wanted a multiple of {_BLOCK}: the naive loop fills whole blocks"
        )
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number from 0 to 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
