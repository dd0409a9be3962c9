"""Would a check of `diffusion`'s blocks by the context tower pay? Quality against passes, with and without it.

The check: the context tower reads a full block with logits. Tokens that it finds less likely than the threshold are
masked again, once, and denoised with the others known; then the block is committed. Beside it `diffusion` as it is at
each γ, `verified` and `ar`. The demo's held-out prompts, greedily, by the naive loop: passes are counted, not timed.

examples:
  python -m benchmarks.verify_threshold --output benchmarks/results/verify_threshold_<hardware>_<date>.md
  python -m benchmarks.verify_threshold --per-family 2 --checks 0.3
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer as BpeTokenizer
from torch import Tensor
from tqdm import tqdm

from benchmarks.reference.naive_loop import NaiveCache, NaiveLoop
from benchmarks.reference.report import bullets, setup, table
from benchmarks.reference.workload import DEMO
from twotower.commands.parser import count, share
from twotower.config import MASK_TOKEN_ID
from twotower.core import Mode, Request, RequestId
from twotower.demo.corpus import Instance, families_of, held_out
from twotower.demo.scores import AR, MAX_NEW_TOKENS, Way
from twotower.demo.tokenizer import decode_answer, encode_prompt, load_tokenizer
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower

_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_CHECKS = (0.05, 0.1, 0.3, 0.5, 0.7)


@dataclass(frozen=True, slots=True)
class Tried:
    """A way of decoding; `check`: below which probability a token is masked again, None for no check."""

    way: Way
    check: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What one or several answers took. `context` counts the reads of blocks and tokens, not those of prompts."""

    right: int = 0
    answers: int = 0
    tokens: int = 0
    denoiser: int = 0
    context: int = 0
    blocks: int = 0
    masked_again: int = 0

    def __add__(self, other: "Found") -> "Found":
        return Found(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    @property
    def quality(self) -> float:
        return self.right / self.answers

    @property
    def per_step(self) -> float:
        return self.tokens / self.denoiser if self.denoiser else float("nan")

    @property
    def per_pass(self) -> float:
        return self.tokens / (self.denoiser + self.context)


class CheckedLoop(NaiveLoop):
    """The naive loop, and `diffusion` with a check."""

    def tried(self, request: Request, check: float | None) -> tuple[list[int], Found]:
        """All tokens, and what they cost an engine, which does not read what nothing follows."""
        if check is not None:
            with torch.inference_mode():
                return self._checked(request, check)
        blocks = list(self.generate(request))
        tokens, steps = [token for block in blocks for token in block.token_ids], sum(b.num_steps for b in blocks)
        return tokens, Found(denoiser=steps, context=len(blocks) - 1, blocks=len(blocks))

    def _checked(self, request: Request, check: float) -> tuple[list[int], Found]:
        params = request.params
        cache, _, last_RV = self.prefill(request.prompt_token_ids)
        tokens, found = list[int](), Found()
        while len(tokens) < params.max_new_tokens:
            block = self._fill_block(cache, request)
            tokens_L, steps = torch.tensor(block.token_ids), block.num_steps
            read, logits_LV = self._read(cache, tokens_L, last_RV)
            doubtful_L = self._doubtful(tokens_L, logits_LV[:-1], check)
            again = bool(doubtful_L.any())
            if again:
                tokens_L, more = self._again(cache, tokens_L, doubtful_L, request)
                read, logits_LV = self._read(cache, tokens_L, last_RV)
                steps += more
            cache, last_RV = read, logits_LV[-1:]
            tokens += tokens_L.tolist()
            ends = self.context.config.eos_token_id in tokens
            reads = 1 + int(again and not ends and len(tokens) < params.max_new_tokens)
            found += Found(denoiser=steps, context=reads, blocks=1, masked_again=int(again))
            if ends:
                break
        return tokens, found

    def _read(self, cache: NaiveCache, tokens_L: Tensor, last_RV: Tensor) -> tuple[NaiveCache, Tensor]:
        """The cache behind the block, and the logits of its tokens and of the one behind it."""
        read, hidden_RLD = self.extend(cache, tokens_L.tolist())
        return read, torch.cat([last_RV, self.context.logits(hidden_RLD)[0]])

    def _doubtful(self, tokens_L: Tensor, logits_LV: Tensor, check: float) -> Tensor:
        """Which tokens, up to the first EOS, the context tower finds less likely than `check`."""
        is_end_L = tokens_L == self.context.config.eos_token_id
        behind_L = is_end_L.cumsum(0) - is_end_L.long() > 0
        return (logits_LV.softmax(-1).gather(1, tokens_L[:, None])[:, 0] < check) & ~behind_L

    def _again(self, cache: NaiveCache, tokens_L: Tensor, masked_L: Tensor, request: Request) -> tuple[Tensor, int]:
        """The block with the masked tokens decided anew, and the steps that took."""
        params, steps = request.params, 0
        tokens_L = torch.where(masked_L, torch.full_like(tokens_L, MASK_TOKEN_ID), tokens_L)
        while masked_L.any():
            left = params.steps_per_block - steps
            tokens_L, masked_L = self._step(cache, tokens_L, masked_L, params.confidence_threshold, left)
            steps += 1
        return tokens_L, steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    checkpoint, cpu = Checkpoint.open(options.checkpoint), torch.device("cpu")
    towers = (load(checkpoint, cpu, torch.float32) for load in (load_context_tower, load_denoiser_tower))
    instances = [one for family in families_of(options.checkpoint) for one in held_out(family, options.per_family)]
    plain = [Tried(Way(Mode.DIFFUSION, threshold)) for threshold in _THRESHOLDS]
    all_tried = [Tried(AR), Tried(Way(Mode.VERIFIED)), *plain]
    all_tried += [replace(one, check=check) for one in plain for check in options.checks]
    loop, tokenizer = CheckedLoop(*towers), load_tokenizer(options.checkpoint)
    found = {
        tried: sum((ask(loop, tokenizer, one, tried) for one in instances), Found())
        for tried in tqdm(all_tried, unit="way")
    }
    command = shlex.join(["python", "-m", "benchmarks.verify_threshold", *(arguments or sys.argv[1:])])
    about = {"checkpoint": checkpoint.fingerprint, "prompts": f"{len(instances)}, {options.per_family} a family"}
    report = f"# A check of blocks by the context tower\n\n{setup(load_before, command)}\n{bullets(about)}\n\n"
    report += render(found) + "\n"
    print(report)
    if options.output is not None:
        options.output.write_text(report, encoding="utf-8")
    return 0


def ask(loop: CheckedLoop, tokenizer: BpeTokenizer, instance: Instance, tried: Tried) -> Found:
    """What one answer is, and costs."""
    prompt = tuple(encode_prompt(tokenizer, instance.prompt))
    request = Request(RequestId("one"), prompt, tried.way.params(MAX_NEW_TOKENS))
    tokens, found = loop.tried(request, tried.check)
    eos = loop.context.config.eos_token_id
    told = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens[:MAX_NEW_TOKENS]
    right = instance.is_answered_by(decode_answer(tokenizer, told))
    return replace(found, right=int(right), answers=1, tokens=len(told))


def render(found: dict[Tried, Found]) -> str:
    """A line a way; for a checked one, which ways without a check are as good for no more passes."""
    rows = []
    for tried, one in found.items():
        rows.append(
            [
                str(tried.way),
                "–" if tried.check is None else f"{tried.check:g}",
                f"{one.quality:.1%}",
                f"{one.per_step:.2f}" if one.denoiser else "–",
                f"{one.per_pass:.2f}",
                f"{one.masked_again / one.blocks:.1%}" if tried.check is not None else "–",
                ", ".join(map(str, _beating(one, found))) if tried.check is not None else "–",
            ]
        )
    head = ["way", "check below", "exact", "tokens/step", "tokens/pass", "blocks masked again", "as good for no more"]
    return (
        table(head, rows)
        + "\n\nA step is a denoiser pass, a pass one of either tower; prompts' are not counted. The last column: ways "
        "without a check that are right at least as often, with at least as many tokens a pass."
    )


def _beating(one: Found, found: dict[Tried, Found]) -> Iterable[Way]:
    plain = ((tried.way, other) for tried, other in found.items() if tried.check is None)
    return [way for way, other in plain if other.quality >= one.quality and other.per_pass >= one.per_pass]


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verify_threshold", description=__doc__, formatter_class=raw
    )
    add = parser.add_argument
    add("--per-family", type=count, default=40, metavar="N", help="prompts of each family (%(default)s)")
    add("--checks", type=_shares, default=_CHECKS, metavar="X,Y", help="of a check (0.05 to 0.7)")
    add("--checkpoint", type=Path, default=DEMO, metavar="DIR", help="a checkpoint of the demo's corpus (the demo)")
    add("--output", type=Path, metavar="FILE.md", help="write the report there")
    return parser


def _shares(text: str) -> tuple[float, ...]:
    return tuple(share(part) for part in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
