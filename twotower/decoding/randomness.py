"""Random numbers as a function of (request seed, block, step, position, token): no state, no order, no device.

A counter-based generator in integer arithmetic. So a request's numbers do not depend on its batch-mates, on the place
where it runs, or on how often it is resumed.
"""

import torch
from torch import Tensor

from twotower.model.transfer import on_device

_WORD = 0xFFFFFFFF
_LONG = 0xFFFFFFFFFFFFFFFF


def step_key(seed: int, block: int, step: int) -> int:
    """A 62-bit key of one step of one block of a request (splitmix64's finaliser over the three numbers)."""
    key = seed & _LONG
    for number in (block, step):
        key = _splitmix64(key ^ _splitmix64(number + 1))
    return key >> 2


def uniform(keys: list[int], positions: int, vocab: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) [R, positions, vocab], fp32 with 24 random bits, a row for each key."""
    keys_R = on_device(keys, device, torch.int64)
    position_L = torch.arange(positions, device=device)
    token_V = torch.arange(vocab, device=device)
    low_RL = _mix((keys_R & _WORD)[:, None] ^ (position_L * 0x9E3779B1 & _WORD))
    high_RL = _mix((keys_R >> 32)[:, None] ^ low_RL)
    bits_RLV = _mix(_mix(high_RL[..., None] ^ (token_V * 0x85EBCA77 & _WORD)) ^ low_RL[..., None])
    return (bits_RLV >> 8).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (lowbias32) on int64 tensors that hold 32-bit words; overflow wraps, the mask cuts it."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _LONG
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _LONG
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _LONG
    return x ^ (x >> 31)
