"""How close the engines come to what their towers allow: a table of targets, every ratio within one run.

    python -m benchmarks.engine --output benchmarks/results/engine_<hardware>_<date>.md   # some fifteen minutes
    python -m benchmarks.engine --quick                                                   # a first look, two minutes
    python -m benchmarks.engine --no-served --concurrency 1,4 --rounds 1                  # a part of it

What happens, in this order:

  1. Two tower processes are started as a `split` cell's are, but without Ray. Their tensors are counted.
  2. Bare passes: each tower's forwards by rows, without an engine, in the process that hosts the tower. First one tower
     at a time, then both at once: this shows what the cores take from each other.
  3. The frozen naive loop gives the steps each request takes. These and the bare passes give the ceilings.
     They are printed before an engine is timed (formulas and assumptions: benchmarks/engine_parts/ceiling.py).
  4. Rounds: the naive loop, then the split pair at every concurrency, in ar and in diffusion at each γ.
     (γ 0.8: few steps per block, γ 1: many.) Answers are 128 tokens long with EOS ignored.
  5. The same with recorders on: who computes when, what a tick is made of.
  6. Requests of all kinds at random times; a 4,000-token prompt beside running requests; py-spy.
  7. The library in process, the whole service over gRPC, the library again.

The machine should be idle: the report gives the load average, and CPU time beside wall time.
"""

import argparse
import asyncio
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.engine_parts.experiment import Experiment
from benchmarks.engine_parts.plan import Plan
from benchmarks.engine_parts.report import render
from benchmarks.reference.workload import DEMO
from twotower.commands.parser import count
from twotower.errors import TwoTowerError
from twotower.model.checkpoint import Checkpoint

_BLOCK = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit status 2 on bad arguments or a checkpoint that cannot be read."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    try:
        checkpoint = Checkpoint.open(DEMO if options.checkpoint == "demo" else Path(options.checkpoint).resolve())
        experiment = Experiment(_plan(options, checkpoint))
    except TwoTowerError as error:
        print(f"engine: {error}", file=sys.stderr)
        return 2
    asyncio.run(experiment.run())
    report = render(experiment, shlex.join(["python", "-m", "benchmarks.engine", *given]))
    if options.output is None:
        print(report)
    else:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report, encoding="utf-8")
        print(f"written to {options.output}")
    return 0


def _plan(options: argparse.Namespace, checkpoint: Checkpoint) -> Plan:
    plan = Plan(
        checkpoint,
        concurrency=options.concurrency,
        thresholds=options.confidence_thresholds,
        max_new_tokens=options.max_new_tokens,
        rounds=options.rounds,
        threads=options.threads,
        served=options.served,
        capture=options.capture,
        seed=options.seed,
    )
    if options.quick:
        return replace(
            plan, rounds=1, prompts=8, per_client=2, pass_s=0.15, watched_per_client=1, arrivals_per_client=2,
            profile_s=2, served=False,
        )  # fmt: skip
    return plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", default="demo", metavar="demo|DIR", help="two-tower checkpoint (demo)")
    add("--concurrency", type=_counts, default=(1, 4, 16), metavar="N,M", help="requests under way at once (1,4,16)")
    add("--confidence-thresholds", type=_shares, default=(0.8, 1.0), metavar="A,B", help="γ of diffusion (0.8,1)")
    add("--max-new-tokens", type=_whole_blocks, default=128, help=f"a multiple of {_BLOCK}, two blocks or more (128)")
    add("--rounds", type=count, default=3, help="of everything that gives a spread (%(default)s)")
    add("--threads", type=count, default=1, help="compute threads of each tower and of the naive loop (%(default)s)")
    add("--capture", choices=("auto", "on", "off"), default="auto", help="the engines' setting (%(default)s)")
    add("--no-served", dest="served", action="store_false", help="without the service over gRPC")
    add("--seed", type=int, default=0, help="of the prompts and of the random arrivals (%(default)s)")
    add("--quick", action="store_true", help="everything small and once, without the service; no result")
    add("--output", type=Path, metavar="FILE.md", help="write the report there instead of printing it")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({count(word) for word in text.split(",")}))


def _whole_blocks(text: str) -> int:
    if count(text) % _BLOCK or int(text) < 2 * _BLOCK:
        raise argparse.ArgumentTypeError(f"got {text}, wanted a multiple of {_BLOCK} from {2 * _BLOCK}")
    return int(text)


def _shares(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = (-1.0,)
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted numbers from 0 to 1")
    return values


if __name__ == "__main__":
    sys.exit(main())
