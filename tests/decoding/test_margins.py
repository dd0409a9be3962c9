"""Margins: whatever moves the logits by less changes no decision, and what is close is said to be close."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.decoding.deciding import decide, fresh
from tests.decoding.test_unmasking import VOCAB, steps
from twotower.decoding.margins import NEAR_TIE
from twotower.decoding.sampling import TokenParams, sample
from twotower.decoding.unmasking import Blocks, StepParams

PART = 0.2  # of its margin by which a row's logits are moved; a half would be too much
SEEN = 1e-5  # smaller margins drown in the rounding of the moved logits


def _moved(logits_RX: Tensor, margin_R: Tensor, seed: int, most: float = 1.0) -> Tensor:
    noise = torch.rand(logits_RX.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    by_R = (margin_R * PART).clamp(max=most)
    return logits_RX + noise.sign() * by_R.view(-1, *[1] * (logits_RX.dim() - 1))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(steps(), st.integers(0, 10**6))
@pytest.mark.slow
def test_a_step_stands_whatever_is_smaller_than_its_margin(step: tuple[Tensor, Blocks], seed: int) -> None:
    logits, blocks = step
    result = decide(logits, blocks)
    assert all(0 <= row.margin <= 1 for row in result)
    again = decide(_moved(logits, torch.tensor([row.margin for row in result]), seed), blocks)
    for then, now in zip(result, again, strict=True):
        if then.margin > SEEN:
            assert (now.committed, now.tokens) == (then.committed, then.tokens)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(steps(bounded=True), st.integers(0, 10**6))
@pytest.mark.slow
def test_a_bounded_step_stands_whatever_is_smaller_than_its_margin(step: tuple[Tensor, Blocks], seed: int) -> None:
    logits, blocks = step
    result = decide(logits, blocks)
    assert all(0 <= row.margin <= 1 for row in result)
    again = decide(_moved(logits, torch.tensor([row.margin for row in result]), seed, most=1e-3), blocks)
    for then, now in zip(result, again, strict=True):
        if then.margin > SEEN:
            assert (now.committed, now.tokens) == (then.committed, then.tokens)


@st.composite
def token_rows(draw: st.DrawFn) -> tuple[Tensor, list[TokenParams]]:
    count, vocab = draw(st.integers(1, 4)), draw(st.sampled_from([2, 9, 200]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits = torch.randn(count, vocab, generator=generator) * draw(st.sampled_from([0.0, 0.1, 1.0, 8.0]))
    rows = [
        TokenParams(
            draw(st.sampled_from([0.0, 0.1, 0.7, 1.0, 5.0])),
            draw(st.sampled_from([0, 0, 1, 5, 1000])),
            draw(st.sampled_from([1.0, 1.0, 0.3, 0.9])),
            draw(st.integers(0, 2**62 - 1)),
        )
        for _ in range(count)
    ]
    return logits, rows


@settings(deadline=None, derandomize=True, max_examples=300)
@given(token_rows(), st.integers(0, 10**6))
@pytest.mark.slow
def test_a_token_stands_whatever_is_smaller_than_its_margin(rows: tuple[Tensor, list[TokenParams]], seed: int) -> None:
    logits, params = rows
    result = sample(logits, params)
    assert ((result.margin_R >= 0) & (result.margin_R <= 1)).all()
    again = sample(_moved(logits, result.margin_R, seed, most=1e-3), params)
    for r, margin in enumerate(result.margin_R.tolist()):
        assert margin <= SEEN or again.tokens_R[r] == result.tokens_R[r]


def _step(probabilities: list[list[float]], row: StepParams) -> float:
    """The margin of one step over positions of which these are the likeliest tokens' probabilities."""
    count = len(probabilities)
    logits = torch.full((1, count, VOCAB), -1e9)
    for place, likely in enumerate(probabilities):
        logits[0, place, 5 : 5 + len(likely)] = torch.tensor(likely).log()
        logits[0, place, 10] = math.log(1 - sum(likely)) if sum(likely) < 1 else -1e9
    return decide(logits, fresh(count, [row]))[0].margin


@pytest.mark.parametrize(
    ("probabilities", "row", "margin"),
    [
        ([[0.6, 0.3]], StepParams(0.5, 1), 0.5),  # the token
        ([[0.6], [0.9, 0.05]], StepParams(1.0, 9), 1 - 0.6 / 0.9),  # who is first
        ([[0.8, 0.1], [0.79, 0.1]], StepParams(0.795, 9), 1 - 0.79 / 0.795),  # nearly above
        ([[0.8, 0.1], [0.9, 0.05]], StepParams(0.799, 9), 1 - 0.799 / 0.8),  # nearly not above
        ([[0.8, 0.1], [0.9, 0.05]], StepParams(0.799, 1), 1 - 0.1 / 0.8),  # must be fixed anyway
        ([[0.7], [0.9, 0.09]], StepParams(0.899, 9), 1 - 0.7 / 0.899),  # the surest needs no threshold
        ([[1.0], [1.0]], StepParams(0.8, 9), 1 - 0.8),  # alike, but both fixed
        ([[1.0], [1.0]], StepParams(1.0, 9), 0.0),
        ([[0.5, 0.5]], StepParams(0.0, 1), 0.0),
        ([[0.5, 0.5], [0.9, 0.05]], StepParams(0.8, 9), 1 - 0.5 / 0.8),  # a tie that is not decided in this step
        ([[1.0]], StepParams(0.0, 1), 1.0),
    ],
)
def test_margins_of_steps(probabilities: list[list[float]], row: StepParams, margin: float) -> None:
    assert _step(probabilities, row) == pytest.approx(margin, abs=2e-6)


def test_margins_of_tokens() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]).log()
    assert sample(logits, [TokenParams(), TokenParams()]).margin_R.tolist() == pytest.approx([0.4, 0.0], abs=1e-6)
    rows = [TokenParams(1.0, key=key) for key in range(2000)]
    drawn = sample(torch.tensor([0.25, 0.5, 0.25]).log().expand(2000, 3), rows)
    for token, most in ((0, 0.5), (1, 1.0), (2, 0.5)):
        mine = drawn.margin_R[drawn.tokens_R == token]
        assert most - 0.02 < mine.max().item() <= most + 1e-5, "four times the way from the middle of its share"
    tied = torch.tensor([0.3, 0.3, 0.2, 0.2]).log().expand(200, 4)
    cut = sample(tied, [TokenParams(1.0, top_k=3, key=key) for key in range(200)])
    assert (cut.margin_R < NEAR_TIE).float().mean().item() > 0.9, "the third is as likely as the fourth"
