"""Instances as tensors. Each train step's batch is a function of (seed, stage, step), so a resumed run sees the
same data as an uninterrupted one.

Shapes: R rows, L positions, P prompt positions, Z blocks of the longest answer, W block width (16).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import torch
from tokenizers import Tokenizer as BpeTokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from twotower.demo.corpus import Instance, stream
from twotower.demo.recipe import BLOCK_SIZE, Stage
from twotower.demo.tokenizer import EOS_ID, PAD_ID, encode_answer, encode_prompt

IGNORED = -100
_OPEN_EVERY = 4
_LENGTHS = 5


@dataclass(frozen=True)
class CausalBatch:
    """Next-token prediction: tokens [R,L]; targets [R,L], IGNORED on prompts and padding."""

    tokens_RL: Tensor
    targets_RL: Tensor


@dataclass(frozen=True)
class BlockBatch:
    """Prompts [R,P] of `lengths_R` and answers cut into blocks [R,Z,W], rows with most blocks first.

    Blocks start where the prompt ends, as in serving; the last one is filled up with eos after the answer's own.
    """

    prompts_RP: Tensor
    lengths_R: Tensor
    answers_RZW: Tensor
    num_blocks_R: Tensor


@dataclass(frozen=True)
class NextTokenBatch:
    """A position of each row: all before its newest token [R,L] of `lengths_R`, that token, and the next one."""

    before_RL: Tensor
    lengths_R: Tensor
    newest_R: Tensor
    targets_R: Tensor


Batch = TypeVar("Batch", CausalBatch, BlockBatch, NextTokenBatch)


def training_instances(seed: int, stage: Stage, step: int, count: int) -> list[Instance]:
    """The `count` instances of one train step."""
    return list(islice(stream("train", f"{seed}/{stage}/{step}"), count))


def causal_batches(tokenizer: BpeTokenizer, instances: list[Instance]) -> list[CausalBatch]:
    """Prompt and answer in one row; only the answer, its eos and the line break before it are targets.

    Rows of about one length lie together: in one batch, half of all positions would be padding.
    """
    rows = []
    for instance in instances:
        prompt, answer = encode_prompt(tokenizer, instance.prompt), encode_answer(tokenizer, instance.answer)
        targets = [IGNORED] * (len(prompt) - 2) + prompt[-1:] + answer
        rows.append((torch.tensor([*prompt, *answer[:-1]]), torch.tensor(targets)))
    rows.sort(key=lambda row: len(row[0]))
    size = -(-len(rows) // _LENGTHS)
    return [_causal_batch(rows[first : first + size]) for first in range(0, len(rows), size)]


def _causal_batch(rows: list[tuple[Tensor, Tensor]]) -> CausalBatch:
    tokens, targets = zip(*rows, strict=True)
    return CausalBatch(
        pad_sequence(list(tokens), batch_first=True, padding_value=PAD_ID),
        pad_sequence(list(targets), batch_first=True, padding_value=IGNORED),
    )


def on(batch: Batch, device: torch.device) -> Batch:
    """The same batch with its tensors on `device`."""
    return replace(batch, **{name: tensor.to(device) for name, tensor in vars(batch).items()})


def block_batch(tokenizer: BpeTokenizer, instances: list[Instance]) -> BlockBatch:
    """Prompts apart from answers, answers in whole blocks.

    Every fourth prompt lacks its line break, which then begins the answer: people forget it on a command line.
    """
    pairs = [(encode_prompt(tokenizer, i.prompt), encode_answer(tokenizer, i.answer)) for i in instances]
    for prompt, answer in pairs[_OPEN_EVERY - 1 :: _OPEN_EVERY]:
        answer.insert(0, prompt.pop())
    pairs.sort(key=lambda pair: -len(pair[1]))
    width = -(-len(pairs[0][1]) // BLOCK_SIZE) * BLOCK_SIZE
    answers = torch.tensor([answer + [EOS_ID] * (width - len(answer)) for _, answer in pairs])
    return BlockBatch(
        pad_sequence([torch.tensor(prompt) for prompt, _ in pairs], batch_first=True, padding_value=PAD_ID),
        torch.tensor([len(prompt) for prompt, _ in pairs]),
        answers.unflatten(1, (-1, BLOCK_SIZE)),
        torch.tensor([-(-len(answer) // BLOCK_SIZE) for _, answer in pairs]),
    )


def next_token_batch(tokenizer: BpeTokenizer, instances: list[Instance], generator: torch.Generator) -> NextTokenBatch:
    """Rows of `causal_batch`, each cut at one of its targets, all equally likely."""
    before, newest, targets = [], [], []
    for instance in instances:
        prompt, answer = encode_prompt(tokenizer, instance.prompt), encode_answer(tokenizer, instance.answer)
        row = prompt + answer
        target = int(torch.randint(len(prompt) - 1, len(row), (), generator=generator))
        before.append(torch.tensor(row[: target - 1]))
        newest.append(row[target - 1])
        targets.append(row[target])
    return NextTokenBatch(
        pad_sequence(before, batch_first=True, padding_value=PAD_ID),
        torch.tensor([len(tokens) for tokens in before]),
        torch.tensor(newest),
        torch.tensor(targets),
    )
