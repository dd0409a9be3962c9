"""Mamba states in 8 bits: what rounding loses, and what must not happen to zeros, extremes, and what is no number."""

import math

import pytest
import torch
from torch import Tensor

from tests.engine.test_host_waits import NoWaiting
from twotower.model.scaled import TOPS, Scaled

FORMATS = pytest.mark.parametrize("dtype", TOPS, ids=str)
# Of a number that is rounded: a share of its channel's largest, and a share of its own.
LOSSES = {torch.int8: (0.5001 / 127, 0.0), torch.float8_e4m3fn: (2**-10 / 448, 2**-4)}


def _random() -> Tensor:
    """Channels from 1e-30 to 1e30, with numbers of all sizes."""
    draw = torch.Generator().manual_seed(1)
    numbers = torch.randn(3, 2, 4, 8, 32, generator=draw) ** 3
    return numbers * torch.logspace(-30, 30, 8)[:, None]


def _back(states: Tensor, dtype: torch.dtype) -> Tensor:
    held = Scaled(torch.empty(states.shape, dtype=dtype), torch.empty(states.shape[:-1]))
    with torch.inference_mode(), NoWaiting():
        held.hold(states.clone())
        return held.to(torch.float32)


@FORMATS
def test_a_number_is_off_by_no_more_than_its_format_says(dtype: torch.dtype) -> None:
    states = _random()
    of_channel, of_own = LOSSES[dtype]
    largest = states.abs().amax(-1, keepdim=True)
    off = (_back(states, dtype) - states).abs()
    assert (off <= largest * of_channel + states.abs() * of_own).all()
    assert (off > 0).float().mean() > 0.5, "nothing was rounded"


def test_int8_is_never_further_off_than_a_twentieth() -> None:
    """The root of the mean square over a channel of 128 numbers, whatever they are: the reason why it is preferred."""
    states = torch.zeros(1, 1, 3, 128)
    states[..., 0, :] = torch.randn(128, generator=torch.Generator().manual_seed(1))
    states[..., 1, 0] = 1.0
    states[..., 2, :] = 0.4999 / 127  # the worst: one outlier, everything else is rounded to nothing
    states[..., 2, 0] = 1.0
    off = (_back(states, torch.int8) - states).norm(dim=-1) / states.norm(dim=-1)
    assert 1 / 25 < off.max() < 1 / 20 and off[..., 0].max() < 1 / 100


@FORMATS
def test_zeros_stay_and_the_least_and_the_largest_neither_vanish_nor_overflow(dtype: torch.dtype) -> None:
    states = torch.tensor([[0.0, -0.0], [1e-42, 0.0], [3e38, -3e38], [1e38, 1.0]])[None, None]
    back = _back(states, dtype)
    assert back.isfinite().all()
    assert not back[..., 0, :].any()
    assert back[..., 1, :].abs().max() < 1e-37
    torch.testing.assert_close(back[..., 2, :], states[..., 2, :])


@FORMATS
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_shows_and_spoils_no_other_channel(dtype: torch.dtype, broken: float) -> None:
    states = _random()
    states[1, 1, 2, 3, 5] = broken
    back, whole = _back(states, dtype).clone(), _back(_random(), dtype).clone()
    assert not back[1, 1, 2, 3].isfinite().any()
    whole[1, 1, 2, 3] = back[1, 1, 2, 3]
    assert torch.equal(back.nan_to_num(), whole.nan_to_num())


@FORMATS
def test_a_sequence_is_rounded_alike_in_any_company(dtype: torch.dtype) -> None:
    states = _random()
    assert torch.equal(_back(states, dtype)[:, 1:], _back(states[:, 1:], dtype))
    held = Scaled(torch.zeros(states.shape, dtype=dtype), torch.zeros(states.shape[:-1]))
    held.hold(states.clone())
    assert torch.equal(held[:, [1]].to(torch.float32), _back(states, dtype)[:, [1]])
