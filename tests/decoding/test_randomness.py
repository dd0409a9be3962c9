"""Random numbers are a function of seed, block, step, position and token, and look like random numbers."""

import pytest
import torch

from tests.goldens import CPU
from twotower.core import MAX_SEED
from twotower.decoding.randomness import step_key, uniform

KEYS = [step_key(seed, block, step) for seed in (0, 1, 2) for block in (0, 1, 2) for step in (0, 1, 2)]


def test_same_numbers_whatever_shares_the_batch() -> None:
    together = uniform(KEYS, 16, 50, CPU)
    for row, key in enumerate(KEYS):
        assert torch.equal(uniform([key], 16, 50, CPU)[0], together[row])
    assert torch.equal(uniform(KEYS, 3, 7, CPU), together[:, :3, :7])


def test_keys_fit_and_differ() -> None:
    seeds = [0, 1, 2, 2**31, 2**53, MAX_SEED]
    keys = {step_key(seed, block, step) for seed in seeds for block in range(40) for step in range(20)}
    assert len(keys) == len(seeds) * 40 * 20
    assert all(0 <= key < 2**62 for key in keys)


def test_a_key_depends_on_the_order_of_its_numbers() -> None:
    assert step_key(0, 1, 2) != step_key(0, 2, 1)
    assert step_key(1, 0, 2) != step_key(0, 1, 2)


def test_in_range_and_uniform() -> None:
    u = uniform(KEYS, 64, 256, CPU).double()
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
    u = uniform(KEYS, 64, 256, CPU).double() - 0.5
    first, second = u.narrow(dim, 0, u.shape[dim] - lag), u.narrow(dim, lag, u.shape[dim] - lag)
    correlation = (first * second).mean().item() * 12
    assert abs(correlation) < 5 / first.numel() ** 0.5


def test_every_position_and_token_gets_its_own_number() -> None:
    u = uniform(KEYS[:4], 32, 128, CPU).flatten()
    # 24 bits: a few of 16384 numbers meet by chance (8 expected), not more.
    assert u.unique().numel() > u.numel() - 30
