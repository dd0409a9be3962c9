"""Guesses in Triton: one program a position reads the head's logits once. It keeps everything else in registers: the
softmax's maximum and sum, the two best scores, and the random bits of a draw.

Imported only where Triton is. Seen so far: under Triton's interpreter on a CPU, never on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.decoding.guesses import Draw
from twotower.decoding.randomness import words
from twotower.model.transfer import on_device

TOKENS = 4096  # at a time


@triton.jit  # type: ignore[untyped-decorator]
def _mixed(x: Any) -> Any:
    """`randomness._mix_words`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit  # type: ignore[untyped-decorator]
def _guess(
    logits: Any, words_2P: Any, temperatures_P: Any, guesses_P4: Any, mask_token: Any, stride: Any,
    V: tl.constexpr, DRAWS: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    position = tl.program_id(0)
    row = logits + position.to(tl.int64) * stride
    if DRAWS:
        temperature = tl.load(temperatures_P + position)
        high = tl.load(words_2P + position).to(tl.uint32, bitcast=True)
        low = tl.load(words_2P + tl.num_programs(0) + position).to(tl.uint32, bitcast=True)
    lanes = tl.zeros((TOKENS,), dtype=tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    grown = tl.full((), 0.0, tl.float32)
    best = tl.full((), float("-inf"), tl.float32)
    second = tl.full((), float("-inf"), tl.float32)
    logit = tl.full((), 0.0, tl.float32)
    chosen = tl.full((), 0, tl.int32)
    for first in range(0, V, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        there = tokens < V
        x = tl.load(row + tokens, mask=there, other=0.0).to(tl.float32)
        lanes += x
        x = tl.where(there, tl.where(tokens == mask_token, -1e12, x), float("-inf"))
        higher = tl.maximum(top, tl.max(x, axis=0))
        grown = grown * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
        top = higher
        score = x
        if DRAWS:
            bits = _mixed(_mixed(high ^ (tokens.to(tl.uint32) * 0x85EBCA77)) ^ low) >> 8
            u = tl.maximum(bits.to(tl.float32) * 5.9604644775390625e-08, 1e-10)
            score = x / temperature - tl.log(-tl.log(u))
        most = tl.max(score, axis=0)
        which = tl.min(tl.where(score == most, tokens, V), axis=0)  # of equal ones the first
        others = tl.where(tokens == which, float("-inf"), score)
        second = tl.maximum(tl.maximum(second, tl.max(others, axis=0)), tl.minimum(best, most))
        its = tl.sum(tl.where(tokens == which, x, 0.0), axis=0)
        logit = tl.where(most > best, its, logit)
        chosen = tl.where(most > best, which, chosen)
        best = tl.maximum(best, most)
    gap = second - best
    if DRAWS:
        gap *= tl.minimum(temperature, 1.0)
    out = guesses_P4 + position * 4
    tl.store(out, chosen.to(tl.float32))
    tl.store(out + 1, tl.exp(logit - top) / grown)
    tl.store(out + 2, tl.exp(gap))
    tl.store(out + 3, tl.sum(lanes, axis=0))


def guess(logits_PV: Tensor, mask_token_id: int, draw: Draw | None) -> Tensor:
    """`guesses.likeliest`, or `guesses.drawn` without bounds. Logits in any floating dtype; they stay as they are."""
    assert logits_PV.stride(1) == 1 and (draw is None or draw.bounds is None)
    positions, vocab = logits_PV.shape
    device = logits_PV.device
    guesses_P4 = torch.empty(positions, 4, device=device)
    words_2P = temperatures_P = guesses_P4  # not looked at
    if draw is not None:
        words_2P = on_device(words(draw.keys, draw.positions), device, torch.int32)
        temperatures_P = on_device(draw.temperatures, device, torch.float32)
    given = (logits_PV, words_2P, temperatures_P, guesses_P4, mask_token_id, logits_PV.stride(0))
    _guess[(positions,)](*given, V=vocab, DRAWS=draw is not None, TOKENS=TOKENS)
    return guesses_P4
