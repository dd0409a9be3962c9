"""A checkpoint's answers to held-out instances, decoded in this process through a `Pair`, the path that serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer as BpeTokenizer

from twotower.core import Mode, Request, RequestId
from twotower.demo.corpus import Instance, families_of, held_out
from twotower.demo.scores import Answer, Score, Way
from twotower.demo.tokenizer import decode_answer, encode_prompt, load_tokenizer
from twotower.engine.in_process import open_pair
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings

SETTINGS = EngineSettings(max_sequences=16, max_sequence_length=512, max_queued_requests=10_000)


async def evaluate(
    directory: Path, ways: Sequence[Way], num_instances: int, settings: EngineSettings = SETTINGS
) -> AsyncIterator[Score]:
    """Scores of a checkpoint, family by family, each decoded in every way, 16 instances at a time.

    Raises CheckpointError.
    """
    tokenizer = load_tokenizer(directory)
    async with open_pair(directory, settings, device="cpu") as pair:
        for family in families_of(directory):
            instances = held_out(family, num_instances)
            for way in ways:
                yield Score(family, str(way), tuple(await _ask_all(pair, tokenizer, instances, way)))


def evaluate_all(
    directory: Path, ways: Sequence[Way], num_instances: int, settings: EngineSettings = SETTINGS
) -> list[Score]:
    """All of `evaluate`'s scores, from outside any event loop."""

    async def gather() -> list[Score]:
        return [score async for score in evaluate(directory, ways, num_instances, settings)]

    return asyncio.run(gather())


def wrong_of(directory: Path, instances: Sequence[Instance], way: Way) -> list[Instance]:
    """The instances that a checkpoint answers wrongly."""

    async def answers() -> list[Answer]:
        async with open_pair(directory, SETTINGS, device="cpu") as pair:
            return await _ask_all(pair, load_tokenizer(directory), instances, way)

    pairs = zip(instances, asyncio.run(answers()), strict=True)
    return [instance for instance, answer in pairs if not answer.right]


class Part(Protocol):
    """Some tokens of an answer, and the denoiser steps and the blocks behind them."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...

    @property
    def num_steps(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...


def answer_of(tokenizer: BpeTokenizer, instance: Instance, mode: Mode, parts: Sequence[Part]) -> Answer:
    """What the events of one request amount to."""
    tokens = tuple(token for part in parts for token in part.token_ids)
    steps = tuple(part.num_steps for part in parts if part.num_steps)
    if mode is Mode.VERIFIED:
        steps = (1,) * sum(part.num_blocks for part in parts)
    elif mode is not Mode.DIFFUSION:
        steps = (1,) * len(tokens)
    digest = blake2b(repr(tokens).encode(), digest_size=6).hexdigest()
    return Answer(instance.is_answered_by(decode_answer(tokenizer, tokens)), len(tokens), steps, digest)


async def _ask_all(pair: Pair, tokenizer: BpeTokenizer, instances: Sequence[Instance], way: Way) -> list[Answer]:
    return await asyncio.gather(*(_ask(pair, tokenizer, instance, way) for instance in instances))


async def _ask(pair: Pair, tokenizer: BpeTokenizer, instance: Instance, way: Way) -> Answer:
    prompt = tuple(encode_prompt(tokenizer, instance.prompt))
    request = Request(RequestId(f"{way}/{instance.prompt.strip()}"), prompt, way.params())
    events = [event async for event in pair.generate(request)]
    return answer_of(tokenizer, instance, way.mode, events)
