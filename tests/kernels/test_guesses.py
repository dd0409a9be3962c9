"""The Triton kernel for guesses under Triton's interpreter, against the plain functions, by the measure of loading."""

import pytest
import torch

from tests.goldens import CPU
from tests.kernels import real
from twotower.decoding.guess_kernels import TOLERANCE, deviations

# What is not finite is among the cases, and the interpreter computes with numpy.
IGNORED = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
pytestmark = [pytest.mark.kernels, pytest.mark.timeout(300), IGNORED]


@pytest.mark.parametrize("vocab", [11, 512, 5000])
def test_guesses(vocab: int) -> None:
    guess = real.load("twotower.decoding.fused_guesses").guess
    with torch.inference_mode():
        for case, deviation in deviations(guess, vocab, CPU, torch.float32):
            assert deviation <= 1e-5 < TOLERANCE, case
