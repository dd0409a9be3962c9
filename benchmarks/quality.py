"""Quality kept against throughput gained: a target answers the demo corpus in every way of decoding.

Writes PREFIX.md, PREFIX.json, PREFIX_trade.png and PREFIX_steps.png. Each run adds a line to PREFIX.jsonl, from which
--resume continues.

examples:
  python -m benchmarks.quality --target local --quick                     a first look, in this process
  python -m cluster up                                                    … and in another terminal:
  python -m benchmarks.quality --target grpc://127.0.0.1:50051 --output benchmarks/results/quality_<hardware>_<date>
  python -m benchmarks.quality --target http://127.0.0.1:8000 --resume --output …     continues a run that was cut short

The target must serve the checkpoint named by --checkpoint (the demo), whose tokenizer reads the answers. Bare passes of
the checkpoint, timed here while the target is idle, give the ceiling of diffusion over AR. A target on another machine
or a GPU has no such ceiling.
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.engine_parts.bare import AR, COMMIT, DENOISE, PROMPT, Bench
from benchmarks.quality_parts.experiment import Experiment
from benchmarks.quality_parts.plan import Plan
from benchmarks.quality_parts.record import Record
from benchmarks.quality_parts.report import Costs, Findings, by_task, render, summary
from benchmarks.quality_parts.targets import runs_here, served_fingerprint, target_of
from benchmarks.reference.report import commit, setting
from benchmarks.reference.workload import DEMO
from twotower.commands.journal import Journal
from twotower.commands.parser import count
from twotower.demo.corpus import families_of
from twotower.demo.tokenizer import load_tokenizer
from twotower.engine.passes import padded
from twotower.errors import ConfigError, TwoTowerError
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower_client import ServiceError

_CACHED = 48  # tokens before the block whose passes are timed: a prompt and a block or two


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit status 2 on bad arguments, 1 where the target does not answer."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    try:
        experiment = _experiment(options)
    except ServiceError as error:
        print(f"quality: {options.target}: {_first_line(error)}", file=sys.stderr)
        return 1
    except TwoTowerError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    try:
        asyncio.run(experiment.run())
    except (ExceptionGroup, TwoTowerError, ServiceError) as error:
        said = _answers_badly(error)
        if said is None:
            raise
        print(f"quality: {options.target}: {said} (--resume continues from here)", file=sys.stderr)
        return 1
    finally:
        experiment.record.close()
    command = shlex.join(["python", "-m", "benchmarks.quality", *(arguments or sys.argv[1:])])
    costs = _costs(options.checkpoint, experiment.prompt_lengths, options.pass_s) if runs_here(options.target) else None
    served = f"{options.target}, checkpoint {Checkpoint.open(options.checkpoint).fingerprint}"
    write(options.output, served, Findings(experiment.plan, experiment.record, costs), load_before, command)
    return 0


def _experiment(options: argparse.Namespace) -> Experiment:
    """Everything that can be wrong is looked at before a record is begun. Raises TwoTowerError or ServiceError."""
    target, plan = target_of(options.target, options.checkpoint), _plan(options)
    mine, tokenizer = Checkpoint.open(options.checkpoint).fingerprint, load_tokenizer(options.checkpoint)
    for family in plan.families:
        plan.instances(family)
    for long in plan.lengths:
        plan.sample(long)
    theirs = served_fingerprint(options.target)
    if theirs is not None and theirs != mine:
        raise ConfigError(f"{options.target}: serves checkpoint {theirs}, wanted {mine}: {options.checkpoint}")
    about = {**plan.about(), "checkpoint": mine, "target": options.target, "commit": commit()}
    journal = Journal(_file(options.output, ".jsonl"), about, options.resume, options.overwrite)
    return Experiment(plan, target, tokenizer, Record(journal))


def write(prefix: Path, target: str, findings: Findings, load_before: float, command: str) -> None:
    from benchmarks.quality_parts import plots

    pictures = {name: _file(prefix, f"_{name}.png") for name in ("trade", "steps")}
    plots.trade(findings, pictures["trade"])
    plots.steps(findings, pictures["steps"])
    shown = "\n\n".join(f"![{name}]({path.name})" for name, path in pictures.items())
    report = render(findings, target, load_before, command) + f"\n{shown}\n"
    _file(prefix, ".md").write_text(report, encoding="utf-8")
    figures = {"setup": setting(load_before, command), "target": target, **summary(findings)}
    _file(prefix, ".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"\n{by_task(findings)}\n")
    print(f"written to {prefix}.md, .json, _trade.png and _steps.png")


def _file(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)


def _costs(checkpoint: Path, prompt_lengths: Sequence[int], seconds: float) -> Costs:
    """Bare passes at one row, in this process."""
    opened, cpu = Checkpoint.open(checkpoint), torch.device("cpu")
    tower = load_context_tower(opened, cpu, torch.float32)
    widths = Counter(map(padded, prompt_lengths))
    benches = {width: Bench(tower, [list(range(4, 4 + width))], _CACHED, "auto") for width in widths}
    context = next(iter(benches.values()))
    denoiser = Bench(load_denoiser_tower(opened, cpu, torch.float32), [list(range(4, 20))], _CACHED, "auto")
    denoiser.mirror(context.read())

    def wall_s(bench: Bench, kind: str) -> float:
        return bench.time(kind, 1, False, False, 0.0, seconds).wall_s

    denoise_s, ar_s = wall_s(denoiser, DENOISE), wall_s(context, AR)
    prompts_s = sum(number * wall_s(benches[width], PROMPT) for width, number in widths.items())
    return Costs(denoise_s, ar_s, wall_s(context, COMMIT), prompts_s / len(prompt_lengths))


def _plan(options: argparse.Namespace) -> Plan:
    whole = Plan(per_family=options.num_instances, rounds=options.rounds, concurrency=options.concurrency)
    return replace(Plan.quick() if options.quick else whole, families=families_of(options.checkpoint))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({1, *map(count, text.split(","))}))


def _answers_badly(error: BaseException) -> str | None:
    """What the target did wrong, in one line; None for a mistake of ours."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return _first_line(error) if isinstance(error, TwoTowerError | ServiceError) else None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--target", default="local", metavar="local|grpc://HOST:PORT|http://HOST:PORT", help="what answers (local)")
    add("--checkpoint", type=Path, default=DEMO, metavar="DIR", help="what the target serves (the demo)")
    add("--num-instances", type=count, default=200, help="per family, for quality (%(default)s)")
    clients = "clients at once in the speed runs; 1, which the curve is of, is always among them (1,4,16)"
    add("--concurrency", type=_counts, default=(1, 4, 16), metavar="N,N", help=clients)
    add("--rounds", type=count, default=3, help="rounds of the speed runs (%(default)s)")
    add("--pass-s", type=float, default=2.0, help="seconds to time each bare pass (%(default)s)")
    add("--quick", action="store_true", help="16 instances a family, four ways, one round, whatever other flags say")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--resume", action="store_true", help="continue the run that left PREFIX.jsonl")
    kept.add_argument("--overwrite", action="store_true", help="replace PREFIX.jsonl")
    add("--output", type=Path, default=Path("quality"), metavar="PREFIX", help="where the files go (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
