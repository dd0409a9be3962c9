"""What experts in 8 and 4 bits cost: quality, tokens a step, and agreement with the unchanged checkpoint in fp32.

Answers the demo's held-out prompts greedily in this process, in `ar`, `verified` and `diffusion`: once with experts as
stored, and once in each format. Writes PREFIX.md and PREFIX.json, named by the sha256 of the weights.

examples:
  python -m benchmarks.quantised                        16 prompts a family; some minutes on a quiet core
  python -m benchmarks.quantised --num-instances 2 --formats int4:16           a first look
  python -m benchmarks.quantised --checkpoint DIR --output benchmarks/results/quantised
"""

import argparse
import asyncio
import hashlib
import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.reference.report import bullets, setting, table
from benchmarks.reference.workload import DEMO
from twotower.commands.parser import count
from twotower.demo.corpus import families_of
from twotower.demo.evaluate import SETTINGS, evaluate
from twotower.demo.scores import AR, USUAL, VERIFIED, Score, identical, mean_accuracy, of_way, tokens_per_step
from twotower.engine.expectation import Expectation
from twotower.engine.in_process import open_pair
from twotower.engine.self_test import score_sample
from twotower.engine.settings import EngineSettings
from twotower.errors import CheckpointError, ConfigError, TwoTowerError
from twotower.expert_formats import GROUPS, ExpertFormat
from twotower.model.checkpoint import Checkpoint
from twotower.model.quantised import dequantised, quantise
from twotower.model.tower import ContextTower
from twotower.planner.weights import weights_of

WAYS = (AR, VERIFIED, USUAL)
_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Row:
    """One format in one way. `same`: the share of its answers that have the tokens of fp32's."""

    experts: str
    way: str
    exact: float
    tokens_a_step: float
    same: float


@dataclass(frozen=True, slots=True)
class Held:
    """The figures of a format: bytes of a tower's experts, and the error of its weights (root mean square, as a share
    of theirs). Also the mean change of known texts' log-probability from fp32, in nats a token.
    """

    experts: str
    nbytes: int
    weights_off: float
    nats_off: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit status 2 on bad arguments."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    try:
        forms = _formats(options)
        rows, held = asyncio.run(_measured(options.checkpoint, forms, options.num_instances))
    except TwoTowerError as error:
        print(f"quantised: {error}", file=sys.stderr)
        return 2
    sha = hashlib.sha256((options.checkpoint / "model.safetensors").read_bytes()).hexdigest()[:12]
    command = shlex.join(["python", "-m", "benchmarks.quantised", *(arguments or sys.argv[1:])])
    about = setting(load_before, command) | {
        "weights": f"sha256 {sha}…",
        "prompts": f"{options.num_instances} of each of {len(families_of(options.checkpoint))} families, held out",
        "decoding": "greedily, blocks of 16, diffusion at γ 0.8; fp32 but for experts; the plain product on a CPU",
    }
    prefix = options.output.with_name(f"{options.output.name}_{sha}")
    prefix.with_name(prefix.name + ".md").write_text(render(about, rows, held), encoding="utf-8")
    values = {"about": about, "rows": [asdict(row) for row in rows], "held": [asdict(one) for one in held]}
    prefix.with_name(prefix.name + ".json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(render(about, rows, held))
    print(f"written to {prefix}.md and .json")
    return 0


def render(about: dict[str, str], rows: Sequence[Row], held: Sequence[Held]) -> str:
    """The report."""
    quality = [
        [row.experts, row.way, f"{100 * row.exact:.1f} %", f"{row.tokens_a_step:.3f}", f"{100 * row.same:.1f} %"]
        for row in rows
    ]
    formats = [
        [
            one.experts,
            f"{one.nbytes / 1e6:.2f}",
            f"{100 * one.weights_off:.2f} %",
            "–" if one.nats_off is None else f"{one.nats_off:.4f}",
        ]
        for one in held
    ]
    return (
        "\n\n".join(
            [
                "# Quantised experts",
                bullets(about),
                table(["experts", "way", "exact", "tokens/step", "answers with fp32's tokens"], quality),
                table(["experts", "a tower's experts, MB", "weights off", "known texts off, nats a token"], formats),
                "Tokens a step: up to the end of the answer, per pass of the deciding tower; in `verified` per round.",
            ]
        )
        + "\n"
    )


def _formats(options: argparse.Namespace) -> list[ExpertFormat]:
    """Those asked for; else all that fit the checkpoint. Raises CheckpointError or ConfigError."""
    config = Checkpoint.open(options.checkpoint).config
    if options.formats is None:
        wanted = [ExpertFormat(8), *(ExpertFormat(4, group) for group in GROUPS)]
        return [form for form in wanted if not _misfits(config, form)]
    for form in options.formats:
        config.with_experts(form)
    return list(options.formats)


def _misfits(config: Any, form: ExpertFormat) -> bool:
    try:
        config.with_experts(form)
    except CheckpointError:
        return True
    return False


async def _measured(
    checkpoint: Path, forms: Sequence[ExpertFormat], num_instances: int
) -> tuple[list[Row], list[Held]]:
    rows: list[Row] = []
    held: list[Held] = []
    reference: list[Score] = []
    likely: list[float] | None = None
    total = (1 + len(forms)) * len(families_of(checkpoint)) * len(WAYS)
    with tqdm(total=total, unit="family", desc="fp32") as bar:
        for form in (None, *forms):
            bar.set_description("fp32" if form is None else str(form))
            settings = _settings(form)
            scores = []
            async for score in evaluate(checkpoint, WAYS, num_instances, settings):
                scores.append(score)
                bar.update()
            ours = await _likelihoods(checkpoint, settings)
            reference, likely = reference or scores, likely or ours
            rows += _rows("fp32" if form is None else str(form), scores, reference)
            held.append(_held(checkpoint, form, ours, likely))
    return rows, held


def _settings(form: ExpertFormat | None) -> EngineSettings:
    return SETTINGS if form is None else replace(SETTINGS, experts=form.word, expert_group=form.group)


def _rows(experts: str, scores: Sequence[Score], reference: Sequence[Score]) -> Iterator[Row]:
    for way in WAYS:
        mine = of_way(scores, way)
        same = identical(mine, of_way(reference, way))
        yield Row(experts, str(way), mean_accuracy(mine), tokens_per_step(mine), same)


async def _likelihoods(checkpoint: Path, settings: EngineSettings) -> list[float] | None:
    """Of the checkpoint's own sample; None where it ships none."""
    expected = Expectation.load(checkpoint)
    if expected is None:
        return None
    async with open_pair(checkpoint, settings, device="cpu") as pair:
        return await score_sample(pair, expected.sample, _PATIENCE_S)


def _held(
    checkpoint: Path, form: ExpertFormat | None, ours: Sequence[float] | None, theirs: Sequence[float] | None
) -> Held:
    opened = Checkpoint.open(checkpoint, form)
    nbytes = weights_of(ContextTower, opened.config, torch.float32).bytes["experts"]
    pairs = zip(ours, theirs, strict=True) if ours is not None and theirs is not None else None
    nats = statistics.mean(abs(mine - wanted) for mine, wanted in pairs) if pairs is not None else None
    return Held("fp32" if form is None else str(form), nbytes, _weights_off(opened, form), nats)


def _weights_off(checkpoint: Checkpoint, form: ExpertFormat | None) -> float:
    """Over all experts of both towers."""
    if form is None:
        return 0.0
    off = whole = 0.0
    with checkpoint.reading() as reader:
        for name in sorted(checkpoint.files, key=lambda name: str(checkpoint.files[name])):
            if ".mixer.experts." in name and name.endswith("_proj.weight"):
                weight = reader.tensor(name).float()
                off += float((dequantised(quantise(weight, form)) - weight).square().sum())
                whole += float(weight.square().sum())
    return (off / whole) ** 0.5


def _format(text: str) -> ExpertFormat:
    word, _, group = text.partition(":")
    try:
        form = ExpertFormat.of(word, int(group) if group else 0)
    except (ConfigError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted int8 or int4:GROUP ({error})") from None
    if form is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted int8 or int4:GROUP")
    return form


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantised",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, default=DEMO, metavar="DIR", help="one that is not quantised (the demo)")
    add("--num-instances", type=count, default=16, help="per family (%(default)s)")
    formats = "int8 and int4:GROUP (all that fit the checkpoint)"
    add("--formats", type=_format, nargs="+", default=None, metavar="FORMAT", help=formats)
    add(
        "--output",
        type=Path,
        default=Path("quantised"),
        metavar="PREFIX",
        help="where the files go (%(default)s_<sha>)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
