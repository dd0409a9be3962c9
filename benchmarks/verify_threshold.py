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
from collections.abc import Iterable, Iterator, Sequence
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
from twotower.demo.tokenizer import EOS_ID, decode_answer, encode_prompt, load_tokenizer
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


@dataclass(frozen=True, slots=True)
class Filled:
    """A block that the denoiser has filled, and what the context tower makes of it."""

    tokens_L: Tensor
    steps: int
    read: NaiveCache
    logits_LV: Tensor  # of each token, and of the one behind the block


class CheckedLoop(NaiveLoop):
    """The naive loop, and `diffusion` with several checks, which share what is the same in all of them."""

    def plain(self, request: Request) -> tuple[list[int], Found]:
        """All tokens in `ar` or `verified`, and what they cost. What the prompt gives, and what ends, is not read."""
        blocks = list(self.generate(request))
        tokens, steps = [token for block in blocks for token in block.token_ids], sum(b.num_steps for b in blocks)
        return tokens, Found(denoiser=steps, context=len(blocks) - 1, blocks=len(blocks))

    @torch.inference_mode()
    def checked(self, request: Request, checks: Sequence[float | None]) -> Iterator[tuple[list[int], Found]]:
        """In `diffusion`, for each check: all tokens, and what they cost an engine."""
        known = dict[tuple[int, ...], Filled]()  # by the new tokens before the block
        cache, _, last_RV = self.prefill(request.prompt_token_ids)
        for check in checks:
            yield self._checked(request, check, cache, last_RV, known)

    def _checked(
        self,
        request: Request,
        check: float | None,
        cache: NaiveCache,
        last_RV: Tensor,
        known: dict[tuple[int, ...], Filled],
    ) -> tuple[list[int], Found]:
        tokens, found, ended = list[int](), Found(), False
        while not ended:
            filled = known.get(tuple(tokens))
            if filled is None:
                block = self._fill_block(cache, request)
                filled = self._read(cache, torch.tensor(block.token_ids), block.num_steps, last_RV)
                known[tuple(tokens)] = filled
            doubtful_L = self._doubtful(filled, check or 0.0)
            again = bool(doubtful_L.any())
            if again:
                filled = self._again(cache, filled, doubtful_L, request, last_RV)
            cache, last_RV = filled.read, filled.logits_LV[-1:]
            tokens += filled.tokens_L.tolist()
            ended = self.context.config.eos_token_id in tokens or len(tokens) >= request.params.max_new_tokens
            reads = int(not ended) if check is None else 1 + int(again and not ended)
            found += Found(denoiser=filled.steps, context=reads, blocks=1, masked_again=int(again))
        return tokens, found

    def _read(self, cache: NaiveCache, tokens_L: Tensor, steps: int, last_RV: Tensor) -> Filled:
        read, hidden_RLD = self.extend(cache, tokens_L.tolist())
        return Filled(tokens_L, steps, read, torch.cat([last_RV, self.context.logits(hidden_RLD)[0]]))

    def _doubtful(self, filled: Filled, check: float) -> Tensor:
        """Which tokens, up to the first EOS, the context tower finds less likely than `check`."""
        is_end_L = filled.tokens_L == self.context.config.eos_token_id
        behind_L = is_end_L.cumsum(0) - is_end_L.long() > 0
        likely_LV = filled.logits_LV[:-1].softmax(-1)
        return (likely_LV.gather(1, filled.tokens_L[:, None])[:, 0] < check) & ~behind_L

    def _again(self, cache: NaiveCache, filled: Filled, masked_L: Tensor, request: Request, last_RV: Tensor) -> Filled:
        """The block with the masked tokens decided anew."""
        params, steps = request.params, 0
        tokens_L = torch.where(masked_L, torch.full_like(filled.tokens_L, MASK_TOKEN_ID), filled.tokens_L)
        while masked_L.any():
            left = params.steps_per_block - steps
            tokens_L, masked_L = self._step(cache, tokens_L, masked_L, params.confidence_threshold, left)
            steps += 1
        return self._read(cache, tokens_L, filled.steps + steps, last_RV)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    checkpoint, cpu = Checkpoint.open(options.checkpoint), torch.device("cpu")
    towers = (load(checkpoint, cpu, torch.float32) for load in (load_context_tower, load_denoiser_tower))
    instances = [one for family in families_of(options.checkpoint) for one in held_out(family, options.per_family)]
    loop, tokenizer = CheckedLoop(*towers), load_tokenizer(options.checkpoint)
    found = dict[Tried, Found]()
    for way in tqdm([AR, Way(Mode.VERIFIED), *(Way(Mode.DIFFUSION, threshold) for threshold in options.thresholds)]):
        found |= measured(loop, tokenizer, instances, way, options.checks)
    command = shlex.join(["python", "-m", "benchmarks.verify_threshold", *(arguments or sys.argv[1:])])
    about = {"checkpoint": checkpoint.fingerprint, "prompts": f"{len(instances)}, {options.per_family} a family"}
    report = f"# A check of blocks by the context tower\n\n{setup(load_before, command)}\n{bullets(about)}\n\n"
    report += render(found) + "\n"
    print(report)
    if options.output is not None:
        options.output.write_text(report, encoding="utf-8")
    return 0


def measured(
    loop: CheckedLoop, tokenizer: BpeTokenizer, instances: Sequence[Instance], way: Way, checks: Sequence[float]
) -> dict[Tried, Found]:
    """All answers of a way, in `diffusion` without a check and with each."""
    tried = [Tried(way), *(Tried(way, check) for check in checks if way.mode is Mode.DIFFUSION)]
    found = dict.fromkeys(tried, Found())
    for instance in instances:
        request = Request(RequestId("one"), tuple(encode_prompt(tokenizer, instance.prompt)), way.params())
        checked = way.mode is Mode.DIFFUSION
        answers = loop.checked(request, [one.check for one in tried]) if checked else [loop.plain(request)]
        for one, (tokens, cost) in zip(tried, answers, strict=True):
            found[one] += _marked(tokenizer, instance, tokens[:MAX_NEW_TOKENS], cost)
    return found


def _marked(tokenizer: BpeTokenizer, instance: Instance, tokens: list[int], cost: Found) -> Found:
    told = tokens[: tokens.index(EOS_ID) + 1] if EOS_ID in tokens else tokens
    right = instance.is_answered_by(decode_answer(tokenizer, told))
    return replace(cost, right=int(right), answers=1, tokens=len(told))


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
    add("--thresholds", type=_shares, default=_THRESHOLDS, metavar="X,Y", help="γ of diffusion (0.5 to 0.95)")
    add("--checks", type=_shares, default=_CHECKS, metavar="X,Y", help="of a check (0.05 to 0.7)")
    add("--checkpoint", type=Path, default=DEMO, metavar="DIR", help="a checkpoint of the demo's corpus (the demo)")
    add("--output", type=Path, metavar="FILE.md", help="write the report there")
    return parser


def _shares(text: str) -> tuple[float, ...]:
    return tuple(share(part) for part in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
