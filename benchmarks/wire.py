"""What rounded Mamba states on the wire cost: quality, tokens a step, agreement with fp32 on the wire, and bytes.

Answers the demo's held-out prompts greedily, in `diffusion` at γ 0.8 and in `verified`. Both towers run here,
joined by a link as two processes are. Each wire runs several times. Requests meet others in another order each time:
what that changes shows as answers that are not the first run's.

examples:
  python -m benchmarks.wire                        8 prompts a family, two runs; some minutes on a quiet core
  python -m benchmarks.wire --num-instances 1 --wires float32 int8                     a first look
  python -m benchmarks.wire --num-instances 32 --output benchmarks/results/wire_<hardware>_<date>.md
"""

import argparse
import asyncio
import itertools
import math
import os
import shlex
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from benchmarks.reference.report import bullets, setting, table
from benchmarks.reference.workload import DEMO
from twotower.commands.parser import count
from twotower.config import ModelConfig
from twotower.core import Request, RequestId
from twotower.demo.corpus import Instance, families_of, held_out
from twotower.demo.evaluate import SETTINGS, answer_of
from twotower.demo.scores import AR, USUAL, VERIFIED, Answer, Score, Way, identical, mean_accuracy, tokens_per_step
from twotower.demo.tokenizer import encode_prompt, load_tokenizer
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.expectation import Expectation
from twotower.engine.ledger import Ledger
from twotower.engine.pair import Pair
from twotower.engine.runner import EngineRunner
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.protocol import Delta
from twotower.exchange.settings import SSM_WIRE_DTYPES, EngineHooks, LinkSettings
from twotower.exchange.staging import DeltaLayout, StagingBuffer
from twotower.model.cache import TowerCache
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower.model.pages import PAGE_TOKENS, pages_for
from twotower.model.room import Room
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.planner.released import RELEASED

_CPU, _BLOCK, _PATIENCE_S = torch.device("cpu"), 16, 600.0
_NUMBERS = itertools.count()  # of requests


class Row(NamedTuple):
    """One wire in one way, all runs together. `same`: the share of its answers that have the tokens of the reference;
    `again`: of later runs' answers, those that have its own first run's; `acceptance`: of drafted tokens."""

    wire: str
    way: str
    exact: float
    tokens_a_step: float
    same: float
    again: float | None
    acceptance: str


class Towers:
    """Both of a checkpoint's, and pairs over them."""

    def __init__(self, directory: Path) -> None:
        checkpoint = Checkpoint.open(directory)
        self.context: ContextTower = load_context_tower(checkpoint, _CPU, torch.float32)
        self.denoiser: DenoiserTower = load_denoiser_tower(checkpoint, _CPU, torch.float32)

    @asynccontextmanager
    async def pair(self, wire: str) -> AsyncIterator[Pair]:
        """An engine for each on a thread of its own, joined over gloo."""
        runners = [EngineRunner(), EngineRunner()]
        hooks = [EngineHooks(runner.progress, runner.wake) for runner in runners]
        context = ContextEngine(self.context, SETTINGS, runners[0].emit)
        port, address = open_port(context.cache, 0, 0, LinkSettings(60, ssm_wire_dtype=wire), hooks[0])
        runners[0].start([context], _CPU)
        context.connect(port)
        mirror = new_cache(self.context.config, SETTINGS.max_sequences, SETTINGS.pages * PAGE_TOKENS)
        link = await asyncio.to_thread(connect, address, mirror, hooks[1])
        runners[1].start([DenoiserEngine(self.denoiser, link, SETTINGS, runners[1].emit)], _CPU)
        rooms = [Room(SETTINGS.max_sequences, SETTINGS.pages) for _ in runners]
        try:
            ledger = Ledger(rooms[0], rooms[1:], SETTINGS.max_queued_requests, stride=SETTINGS.prefix_stride)
            async with Pair(runners[0], runners[1:], ledger) as pair:
                yield pair
        finally:
            for runner in reversed(runners):
                await asyncio.to_thread(runner.stop)

    def states_off(self, wire: str, texts: Sequence[Sequence[int]]) -> float:
        """How far the states after these texts are off on the other side: the root of the mean square, as a share of
        theirs."""
        off = whole = 0.0
        for text in texts:
            cache = new_cache(self.context.config, 1, len(text))
            slot = cache.allocate(len(text))
            with torch.inference_mode():
                self.context(torch.tensor([text]), cache.extending([slot], [len(text)], len(text)), only_states=True)
            cache.advance(slot, len(text))
            layout, delta = DeltaLayout(cache, wire), [Delta(0, 0, len(text), slot)]
            buffer = StagingBuffer(layout.nbytes(delta), _CPU, through_host=False)
            layout.pack(delta, buffer)
            sent = cache.ssm[:, slot]
            off += float((layout.views(delta, buffer)[3].to(torch.float32)[:, 0] - sent).square().sum())
            whole += float(sent.square().sum())
        return math.sqrt(off / whole)


def new_cache(config: ModelConfig, slots: int, tokens: int) -> TowerCache:
    return TowerCache(config, slots, pages_for(tokens), _CPU, torch.float32)


def commit_bytes(config: ModelConfig, wire: str, dtype: torch.dtype) -> int:
    """Of one block's delta: keys, values and conv windows are in `dtype`."""
    return DeltaLayout(TowerCache(config, 1, 1, torch.device("meta"), dtype), wire).nbytes([Delta(0, 0, _BLOCK, 0)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit status 2 on bad arguments."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(given)
    if options.wires[0] != "float32":
        parser.error(f"--wires: got {options.wires[0]} first, wanted float32, which the others are compared with")
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    towers, tokenizer = Towers(DEMO), load_tokenizer(DEMO)
    rows = asyncio.run(_measured(towers, tokenizer, options))
    about = setting(load_before, shlex.join(["python", "-m", "benchmarks.wire", *given])) | {
        "prompts": f"{options.num_instances} of each of {len(families_of(DEMO))} families, held out",
        "runs of each wire": str(options.runs),
        "decoding": "greedily, blocks of 16, both towers in fp32 on a CPU, joined over gloo",
    }
    text = render(about, rows, [_sizes(towers, wire) for wire in options.wires])
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    print(text)
    return 0


def render(about: dict[str, str], rows: Sequence[Row], sizes: Sequence[Sequence[str]]) -> str:
    """The report."""
    quality = [
        [row.wire, row.way, _share(row.exact), f"{row.tokens_a_step:.3f}", *map(_share, row[4:6]), row.acceptance]
        for row in rows
    ]
    heads = ["wire", "way", "exact", "tokens/step", "answers as wanted", "as in its first run", "accepted"]
    bytes_heads = ["wire", "states off", "demo, bytes a commit", "released model, MB a commit"]
    notes = (
        "Tokens a step: up to the end of the answer, per denoiser step; in `verified` per round. Wanted are in "
        "`diffusion` those of float32's first run, in `verified` those of `ar`. States off: after known texts, root of "
        "the mean square as a share of theirs."
    )
    parts = ["# Mamba states on the wire", bullets(about), table(heads, quality), table(bytes_heads, sizes), notes]
    return "\n\n".join(parts) + "\n"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _sizes(towers: Towers, wire: str) -> list[str]:
    expected = Expectation.load(DEMO)
    assert expected is not None
    off = towers.states_off(wire, [known.prompt_token_ids + known.answer_token_ids for known in expected.sample])
    demo = commit_bytes(towers.context.config, wire, torch.float32)
    return [wire, f"{100 * off:.2f} %", str(demo), f"{commit_bytes(RELEASED, wire, torch.bfloat16) / 1e6:.2f}"]


async def _measured(towers: Towers, tokenizer: Tokenizer, options: argparse.Namespace) -> list[Row]:
    instances = [held_out(family, options.num_instances) for family in families_of(DEMO)]
    asked = [instance for family in instances for instance in family]
    rows: list[Row] = []
    async with towers.pair("float32") as pair:
        reference = {VERIFIED: (await _run(pair, tokenizer, asked, AR))[0]}
    for wire, way in tqdm([(wire, way) for wire in options.wires for way in (USUAL, VERIFIED)]):
        async with towers.pair(wire) as pair:
            runs = [await _run(pair, tokenizer, asked, way) for _ in range(options.runs)]
        rows.append(_row(wire, way, runs, reference.setdefault(way, runs[0][0])))
    return rows


def _row(wire: str, way: Way, runs: Sequence[tuple[list[Answer], int, int]], reference: Sequence[Answer]) -> Row:
    scores = [Score("all", str(way), tuple(run[0])) for run in runs]
    theirs = Score("all", "", tuple(reference))
    drafted, accepted = sum(run[1] for run in runs), sum(run[2] for run in runs)
    return Row(
        *(wire, str(way), mean_accuracy(scores), tokens_per_step(scores)),
        same=identical(scores, [theirs] * len(scores)),
        again=identical(scores[1:], scores[:1] * (len(scores) - 1)) if len(scores) > 1 else None,
        acceptance=f"{100 * accepted / drafted:.1f} %" if drafted else "–",
    )


async def _run(pair: Pair, tokenizer: Tokenizer, asked: Sequence[Instance], way: Way) -> tuple[list[Answer], int, int]:
    """The answers, and of all drafts the tokens that were proposed and accepted."""
    drafted = accepted = 0

    async def ask(instance: Instance) -> Answer:
        nonlocal drafted, accepted
        prompt = tuple(encode_prompt(tokenizer, instance.prompt))
        request = Request(RequestId(str(next(_NUMBERS))), prompt, way.params())
        events = [event async for event in pair.generate(request, _PATIENCE_S)]
        drafted += sum(event.num_drafted for event in events)
        accepted += sum(event.num_accepted for event in events)
        return answer_of(tokenizer, instance, way.mode, events)

    return list(await asyncio.gather(*map(ask, asked))), drafted, accepted


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wire", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--num-instances", type=count, default=8, help="per family (%(default)s)")
    add("--runs", type=count, default=2, help="of each wire (%(default)s)")
    wires = "in this order; the first must be float32 (all)"
    add("--wires", nargs="+", choices=SSM_WIRE_DTYPES, default=list(SSM_WIRE_DTYPES), help=wires)
    add("--output", type=Path, metavar="FILE", help="also write the report there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
