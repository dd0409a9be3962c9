"""`python -m twotower.demo train | evaluate | corpus`: the demo checkpoint, its training and its tasks."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from twotower.commands.ending import OK, ended
from twotower.commands.parser import Parser, count, share
from twotower.config import ModelConfig
from twotower.core import Mode
from twotower.demo.corpus import families_of, stream
from twotower.demo.earlier import read_earlier
from twotower.demo.evaluate import evaluate
from twotower.demo.families import FAMILIES
from twotower.demo.recipe import Recipe, continued
from twotower.demo.scores import AR, MOCK_AR, Score, Way, every_way, of_way, retained, table, to_json
from twotower.demo.ship import ship
from twotower.demo.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from twotower.demo.trainer import STATE_FILE, Trainer, saved_recipe
from twotower.engine.in_process import pick_device
from twotower.errors import ConfigError

CHECKPOINT = Path(__file__).parent / "checkpoint"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    return ended(_run, options)


def _run(options: argparse.Namespace) -> int:
    options.run(options)
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m twotower.demo", description=__doc__)
    parser.add_argument(
        "--threads", type=count, default=torch.get_num_threads(), help="CPU threads; 1 if other processes use the cores"
    )
    commands = parser.add_subparsers(required=True)

    train = commands.add_parser("train", help="train both towers and write the checkpoint")
    train.add_argument("--output", type=Path, default=Path("demo-run"), help="run directory; holds checkpoint/")
    train.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="go on from finished checkpoints, the mean of their weights and the first one's tokenizer, with fewer "
        "train steps and lower rates",
    )
    train.add_argument("--resume", action="store_true", help="go on from the run directory's saved state")
    train.add_argument("--train-steps", type=count, nargs=2, metavar=("CONTEXT", "DENOISER"), help="of the two stages")
    train.add_argument("--seed", type=int, help="0, or that of the run resumed")
    train.add_argument(
        "--device", default="auto", help="auto | cpu | cuda | cuda:N (default: auto, a GPU where there is one)"
    )
    train.set_defaults(run=_train)

    score = commands.add_parser(
        "evaluate",
        help="exact match, tokens per step and what is kept of ar's, family by family",
        epilog="With intervals, steps by block, speed and plots: python -m benchmarks.quality --target local",
    )
    score.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    score.add_argument("--num-instances", type=count, default=200, help="per family")
    swept = score.add_mutually_exclusive_group()
    swept.add_argument("--confidence-threshold", type=share, nargs="+", default=[0.8], help="γ of diffusion")
    swept.add_argument("--full", action="store_true", help="every γ from 0.5 to 1, and T 4 and 8 at γ 0.8")
    score.add_argument("--json", action="store_true", help="one JSON object a score instead of the table")
    score.set_defaults(run=_evaluate)

    corpus = commands.add_parser("corpus", help="show instances")
    corpus.add_argument("--show", type=count, default=5, help="how many")
    corpus.add_argument("--family", choices=list(FAMILIES))
    corpus.add_argument("--split", choices=["train", "test"], default="train")
    corpus.add_argument("--seed", type=int, default=0)
    corpus.set_defaults(run=_corpus)
    return parser


def _train(options: argparse.Namespace) -> None:
    output: Path = options.output
    device = pick_device(options.device)
    if options.resume and options.earlier:
        raise ConfigError("--from: a run that is resumed goes on from its own state")
    if options.resume:
        recipe = saved_recipe(output)
        if options.seed not in (None, recipe.seed):
            raise ConfigError(f"--seed: got {options.seed}, but {output} holds a run of seed {recipe.seed}")
        trainer = Trainer(_with_steps(recipe, options.train_steps), load_tokenizer(output), output, device)
        trainer.resume()
    else:
        if (output / STATE_FILE).exists():
            raise ConfigError(f"{output}: holds an earlier run; --resume continues it, or name another --output")
        trainer = _new_trainer(options, device)
    trainer.run()
    ship(trainer, output / "checkpoint")


def _new_trainer(options: argparse.Namespace, device: torch.device) -> Trainer:
    recipe, earlier = Recipe(), None
    if options.earlier:
        recipe = continued()
        earlier = read_earlier(options.earlier, ModelConfig.from_dict(recipe.config))
        recipe = replace(recipe, begun_from=earlier.sha256)
    recipe = _with_steps(replace(recipe, seed=options.seed or 0), options.train_steps)
    tokenizer = load_tokenizer(options.earlier[0]) if options.earlier else train_tokenizer(seed=recipe.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, options.output)
    return Trainer(recipe, tokenizer, options.output, device, earlier)


def _with_steps(recipe: Recipe, train_steps: Sequence[int] | None) -> Recipe:
    if train_steps is None:
        return recipe
    context, denoiser = train_steps
    return replace(
        recipe,
        context=replace(recipe.context, train_steps=context),
        denoiser=replace(recipe.denoiser, train_steps=denoiser),
    )


def _evaluate(options: argparse.Namespace) -> None:
    scores = asyncio.run(_scores(options))
    if not options.json:
        print(table(scores))
        for way in dict.fromkeys(score.way for score in scores):
            if way != str(AR):
                kept = retained([score for score in scores if score.way == way], of_way(scores, AR)).of_means
                print(f"{way} keeps {100 * kept.value:.1f} % of ar's ({100 * kept.low:.1f} to {100 * kept.high:.1f})")


async def _scores(options: argparse.Namespace) -> list[Score]:
    """Scores of every family; with --json each is printed as soon as it is there."""
    swept = [Way(Mode.DIFFUSION, threshold) for threshold in options.confidence_threshold]
    ways = every_way() if options.full else [AR, MOCK_AR, *swept]
    scores = []
    with tqdm(total=len(ways) * len(families_of(options.checkpoint)), unit="score", disable=options.json) as bar:
        async for score in evaluate(options.checkpoint, ways, options.num_instances):
            scores.append(score)
            bar.set_postfix_str(f"{score.family} {score.way} {100 * score.accuracy:.1f} %", refresh=False)
            bar.update()
            if options.json:
                print(to_json(score), flush=True)
    return scores


def _corpus(options: argparse.Namespace) -> None:
    for instance in islice(stream(options.split, options.seed, options.family), options.show):
        print(json.dumps(asdict(instance)))


if __name__ == "__main__":
    sys.exit(main())
