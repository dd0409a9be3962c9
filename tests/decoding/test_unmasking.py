"""What a diffusion step may and must do, whatever the logits: counts, order, immutability, independence of rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.decoding import whole_blocks
from tests.decoding.deciding import decide, fresh
from tests.goldens import CPU
from twotower.decoding import guesses
from twotower.decoding.bounds import UNBOUNDED, Bounds
from twotower.decoding.unmasking import MASK_TOKEN_ID, Blocks, StepParams, unmask, unmask_at

VOCAB, WIDTH = 11, 12


_bounds = st.builds(
    Bounds, st.sampled_from([0, 0, 1, 3, 1000]), st.sampled_from([1.0, 1.0, 0.3, 0.9]), st.sampled_from([0.0, 0.0, 0.1])
)


@st.composite
def steps(draw: st.DrawFn, bounded: bool = False) -> tuple[Tensor, Blocks]:
    """Logits and rows, up to four, of blocks narrower than the batch; `bounded`: some rows bound their draws."""
    count = draw(st.integers(1, 4))
    logits = torch.randn(count, WIDTH, VOCAB, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    logits = logits * draw(st.sampled_from([0.0, 1.0, 8.0]))
    masked, rows = [], []
    for _ in range(count):
        size = draw(st.integers(1, WIDTH))
        places = draw(st.sets(st.integers(0, size - 1), min_size=1))
        masked.append([place in places for place in range(WIDTH)])
        rows.append(
            StepParams(
                draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])),
                draw(st.integers(1, 20)),
                draw(st.sampled_from([0.0, 1e-40, 0.7, 5.0, 1000.0])),
                draw(st.integers(0, 2**62 - 1)),
                bounds=draw(_bounds) if bounded else UNBOUNDED,
            )
        )
    tokens = [[MASK_TOKEN_ID if m else draw(st.integers(4, VOCAB - 1)) for m in mask] for mask in masked]
    return logits, Blocks(tokens, masked, rows)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.one_of(steps(), steps(bounded=True)))
@pytest.mark.slow
def test_every_step(step: tuple[Tensor, Blocks]) -> None:
    logits, blocks = step
    for r, result in enumerate(decide(logits, blocks)):
        tokens, masked, row = blocks.tokens[r], blocks.masked[r], blocks.rows[r]
        fixed = {place for place, now in enumerate(result.committed) if now}
        left = {place for place, still in enumerate(masked) if still}
        assert result.finite
        assert fixed <= left, "fixed twice"
        for place, (before, after) in enumerate(zip(tokens, result.tokens, strict=True)):
            assert place in fixed or before == after, "changed without being fixed"
            assert place not in fixed or after == result.predicted[place] != MASK_TOKEN_ID
        threshold = torch.tensor(row.confidence_threshold).item()
        above = sum(result.confidence[place] > threshold for place in left)
        assert len(fixed) == min(len(left), max(above, 1, math.ceil(len(left) / row.steps_left)))
        # The surest first; among equals the later one.
        order = sorted(left, key=lambda place: (result.confidence[place], place))
        assert fixed == set(order[len(order) - len(fixed) :])
        [alone] = decide(logits[r : r + 1], Blocks([tokens], [masked], [row]))
        assert (alone.tokens, alone.committed) == (result.tokens, result.committed)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(steps())
def test_masked_positions_alone_decide_as_whole_blocks_did(step: tuple[Tensor, Blocks]) -> None:
    """To the last bit: tokens, what was fixed, confidences, margins; drawn and not."""
    logits, blocks = step
    ours, whole = unmask(logits.clone(), blocks), whole_blocks.unmask(logits.clone(), blocks, MASK_TOKEN_ID)
    masked = torch.tensor(blocks.masked)
    for column in range(5):
        some = slice(column * WIDTH, (column + 1) * WIDTH)
        told = masked if column in (2, 3) else torch.ones_like(masked)
        assert torch.equal(ours[:, some][told], whole[:, some][told])
    assert torch.equal(ours[:, -3:-1], whole[:, -3:-1])


@settings(deadline=None, derandomize=True, max_examples=30)
@given(steps(bounded=True), st.integers(1, 20))
def test_logits_are_asked_for_once_at_masked_positions_and_few_at_a_time(
    step: tuple[Tensor, Blocks], most: int
) -> None:
    logits, blocks = step
    asked: list[int] = []

    def logits_at(places_P: Tensor) -> Tensor:
        assert len(places_P) <= most
        asked.extend(places_P.tolist())
        return logits.flatten(0, 1).index_select(0, places_P)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(guesses, "AT_ONCE", most * VOCAB)
        outcome = unmask_at(logits_at, blocks, WIDTH, VOCAB, CPU).tolist()
    assert sorted(asked) == torch.tensor(blocks.masked).flatten().nonzero()[:, 0].tolist()
    for mine, whole in zip(blocks.read(outcome), decide(logits, blocks), strict=True):
        assert (mine.tokens, mine.committed, mine.margin) == (whole.tokens, whole.committed, whole.margin)


@pytest.mark.parametrize("left", range(1, 9))
def test_always_done_in_time(left: int) -> None:
    """However unsure the denoiser is, a block takes no more steps than it was given."""
    tokens, masked = [MASK_TOKEN_ID] * 8, [True] * 8
    for step in range(left):
        assert any(masked)
        logits = torch.randn(1, 8, VOCAB, generator=torch.Generator().manual_seed(step)) / 100
        [result] = decide(logits, Blocks([tokens], [masked], [StepParams(1.0, left - step)]))
        tokens, masked = result.tokens, [m and not now for m, now in zip(masked, result.committed, strict=True)]
    assert not any(masked)


def test_the_threshold_is_strict() -> None:
    logits = torch.full((1, 4, VOCAB), -1e9)
    logits[0, :, 5] = 0.0  # a confidence of exactly 1
    assert decide(logits, fresh(4, [StepParams(1.0, 4)]))[0].committed == [False, False, False, True]
    assert all(decide(logits, fresh(4, [StepParams(0.999, 4)]))[0].committed)


def test_confidence_is_of_the_unscaled_distribution() -> None:
    logits = torch.randn(1, 6, VOCAB, generator=torch.Generator().manual_seed(1))
    [result] = decide(logits, fresh(6, [StepParams(0.5, 6, temperature=3.0, key=77)]))
    logits[..., MASK_TOKEN_ID] = -torch.inf
    wanted = logits.softmax(-1).gather(2, torch.tensor(result.predicted)[None, :, None])[0, :, 0]
    assert result.confidence == pytest.approx(wanted.tolist())


def test_sampling_follows_the_temperature() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    logits = torch.full((1, 1, VOCAB), -1e9)
    logits[0, 0, 5:8] = probabilities.log()
    count, temperature = 3000, 2.0
    rows = [StepParams(0.8, 1, temperature, key=key * 104729 + 3) for key in range(count)]
    drawn = [token for row in decide(logits.expand(count, 1, VOCAB), fresh(1, rows)) for token in row.tokens]
    frequencies = torch.bincount(torch.tensor(drawn), minlength=VOCAB)[5:8] / count
    wanted = probabilities.sqrt() / probabilities.sqrt().sum()
    assert (frequencies - wanted).abs().max().item() < 0.035


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_that_is_not_finite_says_so_and_leaves_the_others_alone(bad: float, temperature: float) -> None:
    logits = torch.randn(3, 5, VOCAB, generator=torch.Generator().manual_seed(2))
    blocks = fresh(5, [StepParams(0.3, 3, temperature)] * 3)
    wanted = decide(logits, blocks)
    logits[1, 4, 9] = bad
    result = decide(logits, blocks)
    assert [row.finite for row in result] == [True, False, True]
    assert [result[row].tokens for row in (0, 2)] == [wanted[row].tokens for row in (0, 2)]
