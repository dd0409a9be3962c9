"""How much sooner an answer begins where its prompt begins like an earlier one: few-shot prompts on the demo.

Two pairs in this process over the same towers, one that keeps prefixes and one that does not. Each question stands
behind the same examples, and is asked of both, in turns. Time to the first event, and this process's CPU time until
then, which work beside it on the machine changes less. Tokens and scores must be the same.

examples:
  python -m benchmarks.prefix
  python -m benchmarks.prefix --tokens 1024 --rounds 3
  python -m benchmarks.prefix --output benchmarks/results/prefix_<hardware>_<date>.md
"""

import argparse
import asyncio
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.reference.report import bullets, setup, spread, table
from benchmarks.reference.workload import DEMO
from twotower.commands.parser import count
from twotower.core import DecodingParams, Mode, Request, RequestId, ScoreRequest
from twotower.demo.corpus import stream
from twotower.demo.tokenizer import encode_prompt, load_tokenizer
from twotower.engine.in_process import pair_of
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower

KINDS = ("ar", "diffusion", "verified", "score")
_NEW_TOKENS = 16


@dataclass(slots=True)
class Asked:
    """What one question took: seconds to the first event, CPU seconds until then, tokens that were not read, and the
    answer."""

    seconds: float
    cpu: float
    cached: int
    answer: tuple[object, ...]


@dataclass(slots=True)
class Found:
    """Of one kind of question: all that was asked of each pair, in the same order."""

    without: list[Asked] = field(default_factory=list)
    kept: list[Asked] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return [one.answer for one in self.without] == [one.answer for one in self.kept]

    def ratios(self, name: str) -> list[float]:
        pairs = zip(self.kept, self.without, strict=True)
        return [getattr(one, name) / getattr(other, name) for one, other in pairs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. 1 where answers differ."""
    options, load_before = _parser().parse_args(arguments), os.getloadavg()[0]
    torch.set_num_threads(1)
    prompts = _prompts(options.tokens, options.shared, 1 + len(KINDS) * options.rounds)
    found, first, kept = asyncio.run(_found(prompts, options.chunk))
    command = shlex.join(["python", "-m", "benchmarks.prefix", *(sys.argv[1:] if arguments is None else arguments)])
    about = {
        "prompts": f"{options.tokens} tokens, {options.shared:.0%} of them examples of the demo's tasks that all share",
        "chunks": f"{options.chunk} tokens; of each prompt {found['ar'].kept[0].cached} tokens are not read",
        "rounds": f"{options.rounds} questions of each kind, asked of both pairs in turns; one thread",
        "kept": f"{kept / 2**20:.1f} MiB of states and pages at the end",
        "the first prompt, which finds nothing": f"{first:.2f} of the CPU time without",
    }
    parts = ["# Prompts that begin alike", setup(load_before, command) + "\n" + bullets(about), render(found)]
    report = "\n\n".join(parts) + "\n"
    print(report)
    if options.output is not None:
        options.output.write_text(report, encoding="utf-8")
    return 0 if all(one.same for one in found.values()) else 1


def _prompts(tokens: int, shared: float, questions: int) -> list[tuple[int, ...]]:
    """Of `tokens` each. The examples are the same; what follows is each question's own."""
    tokenizer = load_tokenizer(DEMO)
    ids: list[int] = []
    own = round(tokens * (1 - shared))
    wanted = tokens + questions * own
    for one in stream("train", 42):
        ids += encode_prompt(tokenizer, one.prompt + one.answer + "\n")[1 if ids else 0 :]
        if len(ids) >= wanted:
            break
    examples, rest = ids[: tokens - own], ids[tokens - own :]
    return [(*examples, *rest[number * own : (number + 1) * own]) for number in range(questions)]


async def _found(prompts: Sequence[tuple[int, ...]], chunk: int) -> tuple[dict[str, Found], float, int]:
    """What was found, the first prompt's CPU time over that without, and the bytes kept at the end."""
    opened, cpu = Checkpoint.open(DEMO), torch.device("cpu")
    context = load_context_tower(opened, cpu, torch.float32)
    denoiser = load_denoiser_tower(opened, cpu, torch.float32)
    kept = EngineSettings(4, len(prompts[0]) + 64, prefill_chunk_tokens=chunk)
    without = replace(kept, prefix_cache_bytes=0)
    async with pair_of(context, denoiser, without) as plain, pair_of(context, denoiser, kept) as keeping:
        await _asked(plain, "ar", prompts[0][: 2 * chunk], "warm")  # passes are recorded, memory is there
        first = [(await _asked(pair, "ar", prompts[0], "first")).cpu for pair in (plain, keeping)]
        found = {kind: Found() for kind in KINDS}
        for place, kind in enumerate(KINDS):
            for number, prompt in enumerate(prompts[1 + place :: len(KINDS)]):
                for pair in (plain, keeping) if number % 2 else (keeping, plain):
                    into = found[kind].without if pair is plain else found[kind].kept
                    into.append(await _asked(pair, kind, prompt, f"{kind} {number}"))
        [stats, *_] = await keeping.context.stats()
        return found, first[1] / first[0], stats.prefix_bytes


async def _asked(pair: Pair, kind: str, prompt: tuple[int, ...], name: str) -> Asked:
    """`score`: of the last tokens."""
    began, cpu_began = time.perf_counter(), time.process_time()
    if kind == "score":
        score = await pair.score(ScoreRequest(RequestId(name), prompt, len(prompt) - _NEW_TOKENS), 3600)
        took = time.perf_counter() - began, time.process_time() - cpu_began
        return Asked(*took, score.cached_tokens, score.log_probs)
    params = DecodingParams(Mode(kind), _NEW_TOKENS, ignore_eos=True)
    moments, tokens, cached = list[tuple[float, float]](), list[int](), 0
    async for event in pair.generate(Request(RequestId(name), prompt, params), 3600):
        moments.append((time.perf_counter() - began, time.process_time() - cpu_began))
        cached += event.cached_tokens
        tokens += event.token_ids
    return Asked(*moments[0], cached, tuple(tokens))


def render(found: dict[str, Found]) -> str:
    """The table."""
    rows = [
        [
            kind,
            spread([1000 * asked.seconds for asked in one.without], 0),
            spread([1000 * asked.seconds for asked in one.kept], 0),
            spread(one.ratios("seconds"), 3),
            spread(one.ratios("cpu"), 3),
            f"{statistics.mean(asked.cached for asked in one.kept):.0f}",
            "the same" if one.same else "DIFFER",
        ]
        for kind, one in found.items()
    ]
    head = ["", "ms without", "ms with", "with ÷ without", "of CPU time", "tokens not read", "answers"]
    what = (
        "Milliseconds to the first event: a token, a block of 16, a round; of scores the whole answer. Ratios are of "
    )
    return table(head, rows) + f"\n\n{what}one question asked of both pairs: the median, in brackets least and most."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=count, default=2048, help="of a prompt (%(default)s)")
    add("--shared", type=float, default=0.9, help="part of a prompt that all share (%(default)s)")
    add("--chunk", type=count, default=128, help="tokens that are read at once (%(default)s)")
    add("--rounds", type=count, default=6, help="questions of each kind (%(default)s)")
    add("--output", type=Path, metavar="FILE.md", help="write the report there")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
