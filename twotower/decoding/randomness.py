"""Random numbers as a function of (request seed, block, step, position, token): no state, no order, no device.

A counter-based generator in integer arithmetic. So a request's numbers do not depend on its batch-mates, on the place
where it runs, or on how often it is resumed.
"""

from collections.abc import Sequence

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.model.transfer import on_device

_WORD = 0xFFFFFFFF
_LONG = 0xFFFFFFFFFFFFFFFF
# A 32-bit finaliser (lowbias32): shift and xor, times a factor, and so on.
_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))
_BY_POSITION, _BY_TOKEN = 0x9E3779B1, 0x85EBCA77


def step_key(seed: int, block: int, step: int) -> int:
    """A 62-bit key of one step of one block of a request (splitmix64's finaliser over the three numbers)."""
    key = seed & _LONG
    for number in (block, step):
        key = _splitmix64(key ^ _splitmix64(number + 1))
    return key >> 2


def uniform(keys: Sequence[int], positions: Sequence[int], vocab: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) [P, vocab], fp32 with 24 random bits: of key and position number p in row p."""
    high_P1, low_P1 = on_device(words(keys, positions), device, torch.int32)[..., None]
    token_V = torch.arange(vocab, device=device, dtype=torch.int32).mul_(_signed(_BY_TOKEN))
    bits_PV = _mix_words(_mix_words(high_P1 ^ token_V).bitwise_xor_(low_P1))
    return bits_PV.bitwise_right_shift_(8).bitwise_and_(_WORD >> 8).float().mul_(2.0**-24)


def words(keys: Sequence[int], positions: Sequence[int]) -> list[list[int]]:
    """The two words that each row's numbers come of, as signed numbers [2,P]. On the host: a GPU is slow with many tiny
    operations."""
    word, half = numpy.uint64(_WORD), numpy.uint64(32)
    keys_P, positions_P = numpy.array(keys, numpy.uint64), numpy.array(positions, numpy.uint64)
    low_P = _mix((keys_P & word) ^ (positions_P * numpy.uint64(_BY_POSITION) & word))
    both = numpy.stack([_mix((keys_P >> half) ^ low_P), low_P])
    signed: list[list[int]] = both.astype(numpy.uint32).view(numpy.int32).tolist()
    return signed


def _mix(x: NDArray[numpy.uint64]) -> NDArray[numpy.uint64]:
    """The finaliser on 32-bit words; overflow wraps, the mask cuts it."""
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> numpy.uint64(shift))) * numpy.uint64(factor) & numpy.uint64(_WORD)
    return x


def _mix_words(x: Tensor) -> Tensor:
    """The same on int32 tensors, in place: [P, vocab] is large."""
    for shift, factor in _ROUNDS:
        x.bitwise_xor_(_shifted(x, shift))
        if factor != 1:
            x.mul_(_signed(factor))
    return x


def _shifted(x: Tensor, shift: int) -> Tensor:
    """To the right, as unsigned words."""
    return (x >> shift).bitwise_and_(_WORD >> shift)


def _signed(word: int) -> int:
    """The same 32 bits as a signed number."""
    return word - (1 << 32) if word >> 31 else word


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _LONG
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _LONG
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _LONG
    return x ^ (x >> 31)
