"""How many different experts of a layer the demo's passes touch, for `python -m twotower plan --routing demo`.

The naive loop answers held-out prompts of the demo. Each row's choice of experts is kept: of denoiser steps, commits,
`ar` steps and prompts. A pass of several rows is put together of rows of different prompts, since a row's routing does
not depend on who shares the pass. Of each row so many positions are drawn. Numbers are means over layers and draws.

examples:
  python -m benchmarks.routing                                          80 prompts; half a minute of one core
  python -m benchmarks.routing --output twotower/planner/routing_demo.json
  python -m benchmarks.routing --confidence-threshold 0.8               mostly first steps, where all is masked
"""

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from benchmarks.reference.naive_loop import NaiveLoop
from benchmarks.reference.report import table
from benchmarks.reference.workload import DEMO, Workload
from twotower.commands.parser import count, share
from twotower.core import Mode, Request
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower.model.moe import Router
from twotower.model.tower import ContextTower, DenoiserTower, Tower
from twotower.planner.devices import BLOCK
from twotower.planner.passes import Kind
from twotower.planner.routing import Point

ROWS = (1, 2, 4, 8, 16)
POSITIONS = (1, 2, 3, 4, 6, 8, 12, BLOCK)
GROUP = max(ROWS)  # prompts that are measured together; the spread is between groups
_DRAWS = 60  # of each group
Routed = dict[Kind, list[list[Tensor]]]
"""Prompt by prompt the rows of each kind: the chosen experts [positions, layers, chosen]."""


class Kept:
    """What all routers of a tower choose, pass by pass, while this is entered."""

    def __init__(self, tower: Tower) -> None:
        routers = [module for module in tower.modules() if isinstance(module, Router)]
        self._layers, self._chosen = len(routers), list[Tensor]()
        self._hooks = [router.register_forward_hook(self._keep) for router in routers]

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, _router: nn.Module, _given: object, out: tuple[Tensor, Tensor]) -> None:
        self._chosen.append(out[0])

    def take(self) -> list[Tensor]:
        """Those since the last call, each [positions, layers, chosen]."""
        chosen, self._chosen = self._chosen, []
        return [torch.stack(chosen[at : at + self._layers], 1) for at in range(0, len(chosen), self._layers)]


def routed(
    context: ContextTower, denoiser: DenoiserTower, diffusion: Iterable[Request], ar: Iterable[Request]
) -> Routed:
    """What the towers choose while they answer these."""
    loop, found = NaiveLoop(context, denoiser), dict[Kind, list[list[Tensor]]]()
    with Kept(context) as of_context, Kept(denoiser) as of_denoiser:
        for request in diffusion:
            list(loop.generate(request))
            prompt, read = _after_the_prompt(request, of_context.take())
            found.setdefault(Kind.PREFILL, []).append(prompt)
            found.setdefault(Kind.COMMIT, []).append(read[:-1])  # a service does not read an answer's last block
            found.setdefault(Kind.DENOISE, []).append(of_denoiser.take())
        for request in ar:
            list(loop.generate(request))
            found.setdefault(Kind.STEP, []).append(_after_the_prompt(request, of_context.take())[1])
    return found


def _after_the_prompt(request: Request, passes: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The prompt, which the loop reads in two passes; then what else it reads."""
    number = min(2, len(request.prompt_token_ids))
    return [torch.cat(passes[:number])], passes[number:]


def measured(kind: Kind, rows: list[list[Tensor]], experts: int, rng: Random) -> list[Point]:
    """For each number of rows and of positions of each: different experts of a layer, and the standard error."""
    positions = (1,) if kind is Kind.STEP else POSITIONS
    long_enough = [[row for row in of if len(row) >= positions[-1]] for of in rows]
    usable = [of for of in long_enough if of]
    groups = [usable[at : at + GROUP] for at in range(0, len(usable) - GROUP + 1, GROUP)]
    if len(groups) < 2:
        raise SystemExit(
            f"{kind.value}: got {len(usable)} prompts with {positions[-1]} positions, wanted at least {2 * GROUP}"
        )
    of_groups = [_means(group, positions, experts, rng) for group in groups]
    points = []
    for at, (number, width) in enumerate((r, p) for r in ROWS for p in positions):
        values = [means[at] for means in of_groups]
        off = statistics.stdev(values) / math.sqrt(len(values))
        points.append(Point(number, width, round(statistics.mean(values), 3), round(off, 3)))
    return points


def _means(group: list[list[Tensor]], positions: Sequence[int], experts: int, rng: Random) -> list[float]:
    """Each draw is one order of prompts and of positions. Fewer are the first of more: means grow with both."""
    sums = [0.0] * (len(ROWS) * len(positions))
    for _ in range(_DRAWS):
        drawn = [rng.choice(of) for of in rng.sample(group, len(group))]
        orders = [row[rng.sample(range(len(row)), len(row))] for row in drawn]
        # Of each row the chosen experts as a mask, over its first positions: [rows, widths, layers, experts].
        masks = torch.stack([torch.stack([_mask(row[:width], experts) for width in positions]) for row in orders])
        touched = masks.cummax(0).values[[number - 1 for number in ROWS]].float().sum(-1).mean(-1)
        sums = [total + value for total, value in zip(sums, touched.flatten().tolist(), strict=True)]
    return [total / _DRAWS for total in sums]


def _mask(chosen_PLk: Tensor, experts: int) -> Tensor:
    """Which experts [layers, experts] these positions touch: 1 or 0."""
    layers = chosen_PLk.shape[1]
    chosen = chosen_PLk.transpose(0, 1).flatten(1)
    return torch.zeros(layers, experts, dtype=torch.uint8).scatter_(1, chosen, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    checkpoint, cpu = Checkpoint.open(DEMO), torch.device("cpu")
    towers = (load_context_tower(checkpoint, cpu, torch.float32), load_denoiser_tower(checkpoint, cpu, torch.float32))
    workload = Workload(checkpoint, options.max_new_tokens, options.confidence_threshold, ignore_eos=False)
    asked = (workload.requests(mode, options.prompts, str(mode)) for mode in (Mode.DIFFUSION, Mode.AR))
    rng, config = Random(0), checkpoint.config
    found = routed(*towers, *asked)
    points = {kind: measured(kind, rows, config.n_routed_experts, rng) for kind, rows in found.items()}
    print(render(points))
    if options.output is not None:
        about = {
            "checkpoint": checkpoint.fingerprint,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": shlex.join(["python", "-m", "benchmarks.routing", *(arguments or sys.argv[1:])]),
            "n_routed_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
        }
        options.output.write_text(_told(about, points), encoding="utf-8")
    return 0


def render(points: dict[Kind, list[Point]]) -> str:
    """Different experts of a layer, with the standard error."""
    cells = [
        [kind.value, str(p.rows), str(p.positions), f"{p.touched:.2f} ± {p.off:.2f}"]
        for kind in points
        for p in points[kind]
    ]
    return table(["pass", "rows", "positions of each", "experts touched"], cells)


def _told(about: dict[str, str | int], points: dict[Kind, list[Point]]) -> str:
    """JSON, a point a line: rows, positions of each, different experts, standard error."""
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in about.items())
    kinds = [
        f"  {json.dumps(kind.value)}: [\n" + ",\n".join(f"   {json.dumps(list(point))}" for point in of) + "\n  ]"
        for kind, of in points.items()
    ]
    return "{\n" + head + ' "points": {\n' + ",\n".join(kinds) + "\n }\n}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--prompts",
        type=count,
        default=6 * GROUP,
        help=f"in groups of {GROUP}; the spread is between them (%(default)s)",
    )
    add("--max-new-tokens", type=count, default=2 * BLOCK, help="of an answer, a multiple of a block (%(default)s)")
    threshold = "of diffusion; at 1 a step fixes one token, so that every number of masks counts alike (%(default)s)"
    add("--confidence-threshold", type=share, default=1.0, help=threshold)
    add("--output", type=Path, metavar="FILE.json", help="write what the planner reads")
    return parser


if __name__ == "__main__":
    sys.exit(main())
