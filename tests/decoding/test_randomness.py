"""Random numbers are a function of seed, block, step, position and token, and look like random numbers."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.decoding import whole_blocks
from tests.goldens import CPU
from twotower.core import MAX_SEED
from twotower.decoding.randomness import step_key, uniform

KEYS = [step_key(seed, block, step) for seed in (0, 1, 2) for block in (0, 1, 2) for step in (0, 1, 2)]


def _blocks(keys: Sequence[int], width: int, vocab: int) -> Tensor:
    """Of every position of a block a key: [R, width, vocab]."""
    every_key = [key for key in keys for _ in range(width)]
    return uniform(every_key, [*range(width)] * len(keys), vocab, CPU).unflatten(0, (len(keys), width))


def test_same_numbers_whatever_shares_the_batch() -> None:
    together = _blocks(KEYS, 16, 50)
    for row, key in enumerate(KEYS):
        assert torch.equal(_blocks([key], 16, 50)[0], together[row])
    assert torch.equal(_blocks(KEYS, 3, 7), together[:, :3, :7])


def test_keys_fit_and_differ() -> None:
    seeds = [0, 1, 2, 2**31, 2**53, MAX_SEED]
    keys = {step_key(seed, block, step) for seed in seeds for block in range(40) for step in range(20)}
    assert len(keys) == len(seeds) * 40 * 20
    assert all(0 <= key < 2**62 for key in keys)


def test_a_key_depends_on_the_order_of_its_numbers() -> None:
    assert step_key(0, 1, 2) != step_key(0, 2, 1)
    assert step_key(1, 0, 2) != step_key(0, 1, 2)


def test_in_range_and_uniform() -> None:
    u = _blocks(KEYS, 64, 256).double()
    assert u.shape == (len(KEYS), 64, 256)
    assert u.min() >= 0 and u.max() < 1
    count = u.numel()
    assert u.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / count) ** 0.5)
    assert u.var().item() == pytest.approx(1 / 12, rel=0.01)
    counts = torch.histc(u, bins=64, min=0, max=1)
    chi_square = ((counts - count / 64) ** 2 / (count / 64)).sum().item()
    assert 25 < chi_square < 115  # 63 degrees of freedom: 63 ± 4.6 standard deviations


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["keys", "positions", "tokens"])
@pytest.mark.parametrize("lag", [1, 2, 8])
def test_neighbours_are_independent(dim: int, lag: int) -> None:
    u = _blocks(KEYS, 64, 256).double() - 0.5
    first, second = u.narrow(dim, 0, u.shape[dim] - lag), u.narrow(dim, lag, u.shape[dim] - lag)
    correlation = (first * second).mean().item() * 12
    assert abs(correlation) < 5 / first.numel() ** 0.5


def test_every_position_and_token_gets_its_own_number() -> None:
    u = _blocks(KEYS[:4], 32, 128).flatten()
    # 24 bits: a few of 16384 numbers meet by chance (8 expected), not more.
    assert u.unique().numel() > u.numel() - 30


def test_a_seed_gives_the_same_answer_for_good() -> None:
    """Numbers that were written down with the first form of this function, and that form itself."""
    written = [[6940564, 12164344, 1316605, 1482379, 2350968], [4104864, 15799293, 13055019, 2584064, 5777234]]
    assert KEYS[5] == 3321612848989445046
    assert (uniform([KEYS[5], KEYS[0]], [3, 15], 5, CPU) * 2**24).long().tolist() == written
    assert torch.equal(_blocks(KEYS, 16, 997), whole_blocks.uniform(KEYS, 16, 997))
