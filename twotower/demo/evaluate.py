"""Exact-match scores per task family, for `ar` and for `diffusion` at given thresholds, with tokens per step.

Decodes through a `Pair`, the path that serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as BpeTokenizer

from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.demo.corpus import Instance, held_out
from twotower.demo.families import FAMILIES
from twotower.demo.tokenizer import decode_answer, encode_prompt, load_tokenizer
from twotower.engine.in_process import open_pair
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings

_SETTINGS = EngineSettings(max_sequences=32, max_sequence_length=128, max_queued_requests=10_000)


@dataclass(frozen=True)
class Score:
    """One family under one way of decoding. `num_tokens` counts eos too, `num_steps` the deciding tower's passes."""

    family: str
    decoding: str
    num_instances: int
    num_right: int
    num_tokens: int
    num_steps: int

    @property
    def accuracy(self) -> float:
        """Share of exactly right answers."""
        return self.num_right / self.num_instances

    @property
    def tokens_per_step(self) -> float:
        """Tokens up to eos per pass; what follows eos in the last block counts as nothing."""
        return self.num_tokens / self.num_steps


@dataclass(frozen=True)
class Answer:
    """What came back for one request: token ids, eos included, and the passes that decided them."""

    token_ids: tuple[int, ...]
    num_steps: int


def decodings(thresholds: list[float]) -> dict[str, DecodingParams]:
    """The ways to decode: `ar`, and `diffusion` at each threshold, greedily, with block 16 and 16 steps."""
    ways = {"ar": DecodingParams(mode=Mode.AR, max_new_tokens=48)}
    for threshold in thresholds:
        ways[f"diffusion {threshold:g}"] = DecodingParams(max_new_tokens=48, confidence_threshold=threshold)
    return ways


async def evaluate(directory: Path, thresholds: list[float], num_instances: int) -> AsyncIterator[Score]:
    """Scores of a checkpoint, family by family, each under every way of decoding, on held-out instances.

    Raises CheckpointError.
    """
    tokenizer = load_tokenizer(directory)
    async with open_pair(directory, _SETTINGS, device="cpu") as pair:
        for family in FAMILIES:
            instances = held_out(family, num_instances)
            for name, params in decodings(thresholds).items():
                answers = await asyncio.gather(*(_ask(pair, tokenizer, i, name, params) for i in instances))
                yield _score(tokenizer, family, name, instances, answers)


def evaluate_all(directory: Path, thresholds: list[float], num_instances: int) -> list[Score]:
    """All of `evaluate`'s scores, from outside any event loop."""

    async def gather() -> list[Score]:
        return [score async for score in evaluate(directory, thresholds, num_instances)]

    return asyncio.run(gather())


def table(scores: list[Score]) -> str:
    """A markdown table: a row per family and their mean, accuracy and tokens per step of every way of decoding."""
    ways = list(dict.fromkeys(score.decoding for score in scores))
    rows = [["family", *(f"{way} | tokens/step" for way in ways)], ["---"] * (1 + 2 * len(ways))]
    for family in FAMILIES:
        rows.append([family, *(_cells([s for s in scores if (s.family, s.decoding) == (family, w)]) for w in ways)])
    rows.append(["mean", *(_cells([s for s in scores if s.decoding == way]) for way in ways)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


async def _ask(pair: Pair, tokenizer: BpeTokenizer, instance: Instance, name: str, params: DecodingParams) -> Answer:
    prompt = tuple(encode_prompt(tokenizer, instance.prompt))
    request = Request(RequestId(f"{name}/{instance.prompt.strip()}"), prompt, params)
    token_ids: tuple[int, ...] = ()
    steps = 0
    async for event in pair.generate(request):
        token_ids += event.token_ids
        steps += event.num_steps
    return Answer(token_ids, len(token_ids) if params.mode is Mode.AR else steps)


def _score(tokenizer: BpeTokenizer, family: str, name: str, instances: list[Instance], answers: list[Answer]) -> Score:
    texts = [decode_answer(tokenizer, answer.token_ids) for answer in answers]
    right = sum(instance.is_answered_by(text) for instance, text in zip(instances, texts, strict=True))
    tokens, steps = sum(len(a.token_ids) for a in answers), sum(a.num_steps for a in answers)
    return Score(family, name, len(instances), right, tokens, steps)


def _cells(scores: list[Score]) -> str:
    accuracy = sum(score.accuracy for score in scores) / len(scores)
    per_step = sum(score.num_tokens for score in scores) / sum(score.num_steps for score in scores)
    return f"{100 * accuracy:.1f} % | {per_step:.2f}"
