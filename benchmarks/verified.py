"""How fast verified drafts give `ar`'s answers, beside `ar` and `diffusion`.

Closed-loop clients ask the demo's held-out prompts greedily, in a pair of this process and through the gRPC face of a
service. The report has throughput, the share of answers equal to `ar`'s, tokens a round and accepted drafts. It also
has the floor: the time of bare passes alone.

examples:
  python -m benchmarks.verified
  python -m benchmarks.verified --rounds 1 --requests 16 --in-process
  python -m benchmarks.verified --output benchmarks/results/verified_<hardware>_<date>.md
"""

import argparse
import asyncio
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.reference.report import bullets, setup, spread, table
from benchmarks.reference.service import free_ports
from benchmarks.reference.workload import DEMO, Workload
from benchmarks.verified_parts.bare import KINDS
from benchmarks.verified_parts.experiment import MODES, Experiment, Plan, identical
from twotower.commands.parser import count
from twotower.core import PARAMETERS, Mode
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower

_THRESHOLD = 0.8  # of diffusion


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = _parser().parse_args(arguments)
    plan = Plan(
        options.clients, options.requests, options.rounds, options.repetitions,
        options.draft_steps, options.draft_threshold,
    )  # fmt: skip
    if options.in_process:
        experiment = _measured(plan, options)
    else:
        from benchmarks.chaos_parts.service import Shape, running_service

        with running_service(Shape("colocated", 1), {}, free_ports()) as service:
            experiment = _measured(replace(plan, address=service.grpc), options)
    command = shlex.join(["python", "-m", "benchmarks.verified", *(arguments or sys.argv[1:])])
    report = render(experiment, command)
    print(report)
    if options.output is not None:
        options.output.write_text(report, encoding="utf-8")
    return 0


def _measured(plan: Plan, options: argparse.Namespace) -> Experiment:
    checkpoint, cpu = Checkpoint.open(DEMO), torch.device("cpu")
    context = load_context_tower(checkpoint, cpu, torch.float32)
    denoiser = load_denoiser_tower(checkpoint, cpu, torch.float32)
    workload = Workload(checkpoint, options.max_new_tokens, _THRESHOLD, options.ignore_eos)
    experiment = Experiment(plan, workload, context, denoiser)
    asyncio.run(experiment.run())
    return experiment


def render(experiment: Experiment, command: str) -> str:
    """The whole report."""
    plan, workload = experiment.plan, experiment.workload
    stop = "EOS ignored" if workload.ignore_eos else "stops at EOS"
    drafts = f"verified: draft_steps {plan.draft_steps}, draft_threshold {plan.draft_threshold:g}"
    decoding = (
        f"greedy, block 16; diffusion: γ {_THRESHOLD:g}; {drafts}; at most {workload.max_new_tokens} tokens, {stop}"
    )
    lines = {
        "prompts": f"{plan.requests}, {workload.prompts}; {plan.rounds} rounds, modes and ways in turns",
        "decoding": decoding,
        "service": "none" if plan.address is None else "demo, colocated, one cell, on the same cores",
    }
    parts = [
        "# Verified drafts",
        setup(experiment.load_before, command) + "\n" + bullets(lines),
        "## Throughput\n\n" + _throughput(experiment),
        "## What the answers took\n\n" + _costs(experiment),
        "## Bare passes\n\n" + _bare(experiment),
    ]
    return "\n\n".join(parts) + "\n"


def _throughput(experiment: Experiment) -> str:
    plan, runs = experiment.plan, experiment.found.runs
    rows = []
    for clients in plan.clients:
        for way in plan.ways:
            ar = runs[way, Mode.AR, clients]
            for mode in MODES:
                measured = runs[way, mode, clients]
                pairs = zip(measured, ar, strict=True)
                same, of = identical(measured, ar)
                floor = experiment.found.costs[mode].tokens / experiment.floor_s(mode, clients)
                rows.append(
                    [
                        str(clients), way, str(mode),
                        spread([m.tokens_per_second for m in measured], 0),
                        spread([m.tokens_per_second / base.tokens_per_second for m, base in pairs], 2),
                        f"{floor:.0f}",
                        spread([m.first_token_s * 1e3 for m in measured]),
                        f"{same} of {of}",
                    ]
                )  # fmt: skip
    head = ["clients", "way", "mode", "tokens/s", "÷ ar", "floor, tokens/s", "first tokens, ms", "answers as ar"]
    return (
        table(head, rows)
        + "\n\nMedian over the rounds, smallest to largest in brackets; `÷ ar` within a round. Floor: bare passes "
        "alone, each of as many rows as clients, prompts one by one. `answers as ar`: of the same way and round."
    )


def _costs(experiment: Experiment) -> str:
    rows = []
    for mode, cost in experiment.found.costs.items():
        accepted = f"{cost.num_accepted} of {cost.num_drafted}" if cost.num_drafted else "–"
        each = f"{cost.tokens / cost.num_blocks:.2f}"
        rows.append([str(mode), str(cost.tokens), str(cost.num_steps), str(cost.num_blocks), each, accepted])
    head = ["mode", "tokens", "denoiser steps", "blocks, rounds", "tokens each", "drafted tokens accepted"]
    return table(head, rows)


def _bare(experiment: Experiment) -> str:
    rows = [[str(n), *(f"{bare.of[kind] * 1e3:.2f}" for kind in KINDS)] for n, bare in experiment.found.bare.items()]
    return (
        table(["rows", *(f"{kind}, ms" for kind in KINDS)], rows)
        + "\n\nRecorded passes on one thread, with what each decides; medians. A verified read: hidden states, logits "
        "and choices of 16 positions, and the states moved on to cuts of 4 to 16. A prompt: one row of 16 tokens."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verified", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--clients", type=counts, default=(1, 4, 16), metavar="N,M", help="at once (1,4,16)")
    add("--requests", type=count, default=64, help="prompts (%(default)s)")
    add("--rounds", type=count, default=5, help="each mode once in each, by each way (%(default)s)")
    add("--repetitions", type=count, default=60, help="of each bare pass (%(default)s)")
    add("--max-new-tokens", type=count, default=64, help="(%(default)s)")
    add("--ignore-eos", action="store_true", help="decode to the length limit")
    add("--draft-steps", type=count, default=PARAMETERS["draft_steps"].default, help="(%(default)s)")
    add("--draft-threshold", type=float, default=PARAMETERS["draft_threshold"].default, help="(%(default)s)")
    add("--in-process", action="store_true", help="without a service")
    add("--output", type=Path, metavar="FILE.md", help="write the report there")
    return parser


def counts(text: str) -> tuple[int, ...]:
    """Numbers with commas between them, of a command line."""
    return tuple(count(word) for word in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
