"""The arguments of `python -m cluster tune`, and what it does with them."""

import argparse
import asyncio
import json
import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from cluster.cli.flag_types import host_and_port, seconds
from cluster.cli.tune.report import Findings
from cluster.ops import run_state
from twotower.commands.journal import Journal
from twotower.commands.parser import count, share
from twotower.core import Mode
from twotower.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from cluster.cli.tune.record import Record

_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
DESCRIPTION = """Send your own prompts to the running service, at several confidence thresholds γ and in the modes ar
and verified. Say which γ takes the fewest steps among those that keep the quality you want, and whether verified, which
gives ar's own answers, is as fast.

FILE.jsonl has one object a line: prompt (or prompt_token_ids), and answer where you know the right one.
With answers, quality is the share of exactly right answers divided by ar's share.
Without answers, quality is the share of prompts whose tokens all equal ar's.
"""
EPILOG = """examples:
  python -m cluster tune --input prompts.jsonl --quality-floor 0.98
  python -m cluster tune --input prompts.jsonl --answers answers.jsonl --concurrency 1 --output tuned
"""


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="FILE.jsonl", help="your prompts")
    add("--answers", type=Path, metavar="FILE.jsonl", help="the right answers by id, one object a line")
    add(
        "--quality-floor",
        type=share,
        default=0.98,
        metavar="X",
        help="quality to keep, as a share of ar's (%(default)s)",
    )
    add("--confidence-thresholds", type=_shares, default=_THRESHOLDS, metavar="X,Y", help="γ to try (0.5 to 1)")
    add("--concurrency", type=count, default=16, metavar="N", help="prompts at once (%(default)s)")
    add("--max-new-tokens", type=count, metavar="N", help="tokens of an answer at most (the service's default)")
    add("--timeout", type=seconds, default=120.0, metavar="SECONDS", help="deadline of one answer (%(default)s)")
    add(
        "--address",
        type=host_and_port,
        metavar="HOST:PORT",
        help="gRPC address of the service (default: the one you run)",
    )
    add("--json", action="store_true", help="one JSON object instead of the table")
    add("--output", type=Path, metavar="PREFIX", help="also write PREFIX.json, PREFIX.png and meanwhile PREFIX.part")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--resume", action="store_true", help="continue the run that left PREFIX.part")
    kept.add_argument("--overwrite", action="store_true", help="replace PREFIX.part")


def run(options: argparse.Namespace) -> int:
    """Exit status 2 for a mistake in the input, 1 where the service fails."""
    from cluster.cli.asking import Refused, model_info
    from cluster.cli.tune.questions import read_questions
    from cluster.cli.tune.sweep import AR, VERIFIED, Sweep, Way

    questions = read_questions(options.input, options.answers)
    address = options.address or run_state.grpc_address()
    model = model_info(address)
    if not model.has_tokenizer and any(q.answer is not None or isinstance(q.prompt, str) for q in questions):
        raise InvalidRequest.of(
            "--input",
            f"{address} serves {model.name} without a tokenizer: wanted prompt_token_ids and no answers",
        )
    served = {"address": address, "model": model.name, "checkpoint": model.checkpoint_fingerprint}
    ways = [AR, *(Way(Mode.DIFFUSION, threshold) for threshold in options.confidence_thresholds)]
    if "verified" in model.modes:
        ways.append(VERIFIED)
    sweep = Sweep(
        address,
        questions,
        ways,
        options.concurrency,
        options.max_new_tokens,
        options.timeout,
    )
    served_as = {**served, "defaults": dict(model.defaults or {})}
    record, told = _record(options, {**served_as, **sweep.about()}), False
    try:
        done = len(questions) * len(record.passes.keys() & {*sweep.ways})
        with tqdm(total=sweep.num_calls, initial=done, unit="answer", file=sys.stderr, disable=None) as bar:
            passes = asyncio.run(sweep.run(record.passes, bar.update, record.add))
        _tell(options, served, Findings.of(questions, passes, options.quality_floor, record.resumed))
        told = True
    except Refused as refused:
        where = f"{options.input}, " if refused.mistake else ""
        print(f"error: {where}{refused}", file=sys.stderr)
        return 2 if refused.mistake else 1
    finally:
        record.close(told)
        if record.passes and not told and options.output is not None:
            print(f"{len(record.passes)} passes are kept; --resume continues from there", file=sys.stderr)
    return 0


def _record(options: argparse.Namespace, about: dict[str, object]) -> "Record":
    """Raises ConfigError for a journal that must not be replaced, or that belongs to another sweep."""
    from cluster.cli.tune.record import Record

    if options.output is None:
        if options.resume or options.overwrite:
            raise ConfigError("--resume and --overwrite: wanted --output PREFIX too: they are about PREFIX.part")
        return Record(None)
    return Record(Journal(_file(options.output, ".part"), about, options.resume, options.overwrite))


def _tell(options: argparse.Namespace, served: dict[str, str], findings: Findings) -> None:
    figures = {**served, "measured": date.today().isoformat(), "concurrency": options.concurrency, **findings.figures()}
    if options.json:
        print(json.dumps(figures))
    else:
        print(f"{served['model']} ({served['checkpoint']}) on {served['address']}, {options.concurrency} at once")
        print(findings.text())
    if options.output is not None:
        _file(options.output, ".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        findings.draw(_file(options.output, ".png"))


def _file(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)


def _shares(text: str) -> tuple[float, ...]:
    return tuple(sorted({share(part) for part in text.split(",")}))
