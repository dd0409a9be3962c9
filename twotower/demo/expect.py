"""The expectation shipped beside a trained checkpoint: a few held-out instances a family and what came of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer as BpeTokenizer

from twotower.core import Mode
from twotower.demo.corpus import families_of, held_out
from twotower.demo.tokenizer import encode_answer, encode_prompt, load_tokenizer
from twotower.engine.expectation import Bounds, Expectation, Known
from twotower.engine.in_process import open_pair
from twotower.engine.self_test import decode_sample, score_sample
from twotower.engine.settings import EngineSettings

_AFTER = 300  # other instances than those of scores and speeds
_SETTINGS = EngineSettings(max_sequences=16, max_sequence_length=256, capture="off")
_TIMEOUT_S = 120.0
_SAMPLE = 28  # least number of prompts: about a second at start-up
_LONGEST = 128  # tokens of a prompt and its answer, so that the sample needs a small cache and little time.
_SEARCHED = 50  # instances of a family to search for such short ones


def write_expectation(directory: Path) -> Expectation:
    """Decode the sample in every mode with the weights of `directory`, and leave the bounds beside them."""
    expectation = asyncio.run(_expectation(directory))
    expectation.save(directory)
    return expectation


async def _expectation(directory: Path) -> Expectation:
    tokenizer = load_tokenizer(directory)
    families = families_of(directory)
    per_family = -(-_SAMPLE // len(families))
    texts = [text for family in families for text in _short_texts(tokenizer, family)[:per_family]]
    unscored = [Known(tuple(prompt), tuple(answer), 0.0) for prompt, answer in texts]
    async with open_pair(directory, _SETTINGS, "cpu") as pair:
        likelihoods = await score_sample(pair, unscored, _TIMEOUT_S)
        pairs = zip(unscored, likelihoods, strict=True)
        sample = tuple(replace(known, mean_log_prob=round(likelihood, 4)) for known, likelihood in pairs)
        bounds = [Bounds.around(m, sample, await decode_sample(pair, sample, m, _TIMEOUT_S)) for m in Mode]
    # A mode in which these weights get next to nothing right has no bound that could be broken.
    return Expectation(sample, tuple(bound for bound in bounds if bound.min_right > 0))


def _short_texts(tokenizer: BpeTokenizer, family: str) -> list[tuple[list[int], list[int]]]:
    instances = held_out(family, _SEARCHED, _AFTER)
    texts = [(encode_prompt(tokenizer, i.prompt), encode_answer(tokenizer, i.answer)) for i in instances]
    return [(prompt, answer) for prompt, answer in texts if len(prompt) + len(answer) <= _LONGEST]
