"""What a diffusion step may and must do, whatever the logits: counts, order, immutability, independence of rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twotower.decoding.unmasking import MASK_TOKEN_ID, StepParams, Unmasked, unmask

VOCAB, WIDTH = 11, 12


@st.composite
def steps(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, list[StepParams]]:
    """Logits, tokens, masks and parameters of up to four rows of blocks narrower than the batch."""
    count = draw(st.integers(1, 4))
    logits = torch.randn(count, WIDTH, VOCAB, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    logits = logits * draw(st.sampled_from([0.0, 1.0, 8.0]))
    masked = torch.zeros(count, WIDTH, dtype=torch.bool)
    rows = []
    for row in range(count):
        size = draw(st.integers(1, WIDTH))
        places = draw(st.sets(st.integers(0, size - 1), min_size=1))
        masked[row, list(places)] = True
        rows.append(
            StepParams(
                draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])),
                draw(st.integers(1, 20)),
                draw(st.sampled_from([0.0, 1e-40, 0.7, 5.0, 1000.0])),
                draw(st.integers(0, 2**62 - 1)),
            )
        )
    tokens = torch.where(masked, MASK_TOKEN_ID, torch.randint(4, VOCAB, (count, WIDTH)))
    return logits, tokens, masked, rows


@settings(deadline=None, derandomize=True, max_examples=80)
@given(steps())
def test_every_step(step: tuple[Tensor, Tensor, Tensor, list[StepParams]]) -> None:
    logits, tokens, masked, rows = step
    result = unmask(logits, tokens, masked, rows)
    assert result.finite_R.all()
    for r, row in enumerate(rows):
        committed, confidence = result.committed_RL[r], result.confidence_RL[r]
        assert not (committed & ~masked[r]).any(), "fixed twice"
        assert torch.equal(result.tokens_RL[r][~committed], tokens[r][~committed]), "changed without being fixed"
        assert (result.tokens_RL[r][committed] != MASK_TOKEN_ID).all(), "the mask token was chosen"
        above = int(((confidence > row.confidence_threshold) & masked[r]).sum())
        left = int(masked[r].sum())
        assert int(committed.sum()) == min(left, max(above, 1, math.ceil(left / row.steps_left)))
        # The surest first; among equals the later one.
        order = sorted(masked[r].nonzero().flatten().tolist(), key=lambda i: (confidence[i].item(), i))
        assert set(committed.nonzero().flatten().tolist()) == set(order[len(order) - int(committed.sum()) :])
        _same_alone(unmask(logits[r : r + 1], tokens[r : r + 1], masked[r : r + 1], [row]), result, r)


def _same_alone(alone: Unmasked, together: Unmasked, row: int) -> None:
    assert torch.equal(alone.tokens_RL[0], together.tokens_RL[row])
    assert torch.equal(alone.committed_RL[0], together.committed_RL[row])


@pytest.mark.parametrize("left", range(1, 9))
def test_always_done_in_time(left: int) -> None:
    """However unsure the denoiser is, a block takes no more steps than it was given."""
    tokens, masked = torch.full((1, 8), MASK_TOKEN_ID), torch.ones(1, 8, dtype=torch.bool)
    for step in range(left):
        assert masked.any()
        logits = torch.randn(1, 8, VOCAB, generator=torch.Generator().manual_seed(step)) / 100
        result = unmask(logits, tokens, masked, [StepParams(1.0, left - step)])
        tokens, masked = result.tokens_RL, masked & ~result.committed_RL
    assert not masked.any()


def test_the_threshold_is_strict() -> None:
    logits = torch.full((1, 4, VOCAB), -1e9)
    logits[0, :, 5] = 0.0  # a confidence of exactly 1
    tokens, masked = torch.full((1, 4), MASK_TOKEN_ID), torch.ones(1, 4, dtype=torch.bool)
    assert unmask(logits, tokens, masked, [StepParams(1.0, 4)]).committed_RL.tolist() == [[False, False, False, True]]
    assert unmask(logits, tokens, masked, [StepParams(0.999, 4)]).committed_RL.all()


def test_confidence_is_of_the_unscaled_distribution() -> None:
    logits = torch.randn(1, 6, VOCAB, generator=torch.Generator().manual_seed(1))
    tokens, masked = torch.full((1, 6), MASK_TOKEN_ID), torch.ones(1, 6, dtype=torch.bool)
    result = unmask(logits, tokens, masked, [StepParams(0.5, 6, temperature=3.0, key=77)])
    logits[..., MASK_TOKEN_ID] = -torch.inf
    wanted = logits.softmax(-1).gather(2, result.predicted_RL[..., None])[..., 0]
    assert torch.allclose(result.confidence_RL, wanted)


def test_sampling_follows_the_temperature() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    logits = torch.full((1, 1, VOCAB), -1e9)
    logits[0, 0, 5:8] = probabilities.log()
    count, temperature = 3000, 2.0
    many = logits.expand(count, 1, VOCAB)
    tokens, masked = torch.full((count, 1), MASK_TOKEN_ID), torch.ones(count, 1, dtype=torch.bool)
    rows = [StepParams(0.8, 1, temperature, key=key * 104729 + 3) for key in range(count)]
    drawn = unmask(many, tokens, masked, rows).tokens_RL.flatten()
    frequencies = torch.bincount(drawn, minlength=VOCAB)[5:8] / count
    wanted = probabilities.sqrt() / probabilities.sqrt().sum()
    assert (frequencies - wanted).abs().max().item() < 0.035


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_says_so_and_leaves_the_others_alone(bad: float) -> None:
    logits = torch.randn(3, 5, VOCAB, generator=torch.Generator().manual_seed(2))
    tokens, masked = torch.full((3, 5), MASK_TOKEN_ID), torch.ones(3, 5, dtype=torch.bool)
    rows = [StepParams(0.3, 3)] * 3
    wanted = unmask(logits, tokens, masked, rows)
    logits[1, 4, 9] = bad
    result = unmask(logits, tokens, masked, rows)
    assert result.finite_R.tolist() == [True, False, True]
    assert torch.equal(result.tokens_RL[[0, 2]], wanted.tokens_RL[[0, 2]])
