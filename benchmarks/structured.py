"""What structured output costs in each mode: passes a token and valid answers, beside the same prompts without it.

The demo's held-out prompts, greedily, in a pair of this process. Two constraints: a pattern of what the demo says
anyway, and a JSON Schema of something else, so that the denoiser guesses wrong. Passes are counted; `--timed` tells
seconds, too.

examples:
  python -m benchmarks.structured --timed
  python -m benchmarks.structured --per-family 2 --output benchmarks/results/structured_<hardware>_<date>.md
"""

import argparse
import asyncio
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jsonschema
import torch

from benchmarks.reference.report import bullets, setup, table
from benchmarks.reference.workload import DEMO
from twotower.commands.parser import count
from twotower.constraints import Constraint
from twotower.core import DecodingParams, FinishReason, Mode, Request, RequestId
from twotower.demo.corpus import families_of, held_out
from twotower.demo.tokenizer import encode_prompt, load_tokenizer
from twotower.engine.in_process import open_pair
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings

_MODES = (Mode.AR, Mode.VERIFIED, Mode.DIFFUSION)
_SCHEMA = {
    "type": "object",
    "properties": {
        "number": {"type": "integer", "minimum": 0, "maximum": 9999},
        "kind": {"enum": ["roman", "words", "list"]},
        "right": {"type": "boolean"},
    },
    "required": ["number", "kind", "right"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
_PATTERN = r"[ -~\n]*"
CONSTRAINTS = {
    "none": None,
    "what it says anyway": Constraint("regex", _PATTERN),
    "JSON of a schema": Constraint("json", json.dumps(_SCHEMA)),
}


@dataclass(frozen=True, slots=True)
class Found:
    """All answers of a mode under a constraint. `whole`: those that were not cut, `valid`: of these. `context`: blocks,
    rounds or tokens, for each of which the context tower reads once."""

    answers: int
    whole: int
    valid: int
    tokens: int
    steps: int
    context: int
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    options, load_before = _parser().parse_args(arguments), os.getloadavg()[0]
    torch.set_num_threads(1)
    found = asyncio.run(_found(options))
    command = shlex.join(["python", "-m", "benchmarks.structured", *(sys.argv[1:] if arguments is None else arguments)])
    about = {
        "prompts": f"{found[Mode.AR, 'none'].answers}, held out, {options.clients} at a time",
        "decoding": f"greedy, block 16, γ 0.8, at most {options.max_new_tokens} tokens",
    }
    parts = ["# Structured output", setup(load_before, command) + "\n" + bullets(about), render(found, options.timed)]
    report = "\n\n".join(parts) + "\n"
    print(report)
    if options.output is not None:
        options.output.write_text(report, encoding="utf-8")
    return 0


async def _found(options: argparse.Namespace) -> dict[tuple[Mode, str], Found]:
    tokenizer, found = load_tokenizer(DEMO), dict[tuple[Mode, str], Found]()
    texts = [one.prompt for family in families_of(DEMO) for one in held_out(family, options.per_family)]
    prompts = [tuple(encode_prompt(tokenizer, text)) for text in texts]
    settings = EngineSettings(max_sequences=options.clients, max_queued_requests=len(prompts))
    async with open_pair(DEMO, settings, device="cpu") as pair:
        for mode in _MODES:
            for name, constraint in CONSTRAINTS.items():
                params = DecodingParams(mode, options.max_new_tokens, structured_outputs=constraint)
                asked = [Request(RequestId(f"{mode} {name} {n}"), ids, params) for n, ids in enumerate(prompts)]
                started = time.perf_counter()
                answers = await asyncio.gather(*(_answer(pair, request) for request in asked))
                each = [_judged(tokenizer.decode(tokens), constraint, tokens, cost) for tokens, cost in answers]
                found[mode, name] = _sum(each, time.perf_counter() - started)
    return found


async def _answer(pair: Pair, request: Request) -> tuple[list[int], Found]:
    tokens, found = list[int](), Found(1, 0, 0, 0, 0, 0, 0.0)
    async for event in pair.generate(request, timeout_s=3600):
        tokens += event.token_ids
        found = replace(
            found,
            whole=int(event.finish_reason is FinishReason.STOP),
            tokens=len(tokens),
            steps=found.steps + event.num_steps,
            context=found.context + event.num_blocks,
        )
    return tokens, found


def _judged(text: str, constraint: Constraint | None, tokens: Sequence[int], found: Found) -> Found:
    return replace(found, valid=int(bool(found.whole) and is_valid(text, constraint)))


def is_valid(text: str, constraint: Constraint | None) -> bool:
    """By other libraries than the one that decoding follows."""
    if constraint is None or constraint.kind == "regex":
        return constraint is None or re.fullmatch(constraint.text, text) is not None
    try:
        jsonschema.validate(json.loads(text), json.loads(constraint.text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def _sum(found: Sequence[Found], seconds: float) -> Found:
    totals = [sum(getattr(one, name) for one in found) for name in Found.__slots__[:-1]]
    return Found(*totals, seconds)


def render(found: dict[tuple[Mode, str], Found], timed: bool) -> str:
    """The table."""
    rows = []
    for (mode, name), one in found.items():
        free = found[mode, "none"]
        per_pass, free_per_pass = (each.tokens / (each.steps + each.context) for each in (one, free))
        row = [
            str(mode), name, f"{one.valid} of {one.whole}", str(one.answers - one.whole), str(one.tokens),
            str(one.steps), str(one.context), f"{one.tokens / one.steps:.2f}" if one.steps else "–",
            f"{per_pass / free_per_pass:.2f}",
        ]  # fmt: skip
        rate, free_rate = one.tokens / one.seconds, free.tokens / free.seconds
        rows.append([*row, *([f"{rate:.0f}", f"{rate / free_rate:.2f}"] if timed else [])])
    head = [
        "mode",
        "constraint",
        "valid",
        "cut",
        "tokens",
        "steps",
        "blocks",
        "tokens a step",
        "tokens a pass ÷ without",
    ]
    text = table([*head, *(["tokens/s", "÷ without"] if timed else [])], rows)
    return (
        text + "\n\nBlocks: of `diffusion`, rounds of `verified`, tokens of `ar`; a pass is a step or the read of one."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.structured",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--per-family", type=count, default=8, help="prompts (%(default)s)")
    add("--clients", type=count, default=8, help="at once (%(default)s)")
    add("--max-new-tokens", type=count, default=64, help="(%(default)s)")
    add("--timed", action="store_true", help="tokens/s, too; on a machine that does nothing else")
    add("--output", type=Path, metavar="FILE.md", help="write the report there")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
