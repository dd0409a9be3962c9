"""top-k, top-p and min-p in a diffusion step: what is drawn, how sure that is said to be, and who notices."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.decoding.deciding import decide, fresh
from tests.goldens import CPU
from twotower.config import MASK_TOKEN_ID
from twotower.decoding import guesses
from twotower.decoding.bounds import UNBOUNDED, Bounds
from twotower.decoding.guesses import Draw
from twotower.decoding.margins import NEAR_TIE
from twotower.decoding.randomness import uniform
from twotower.decoding.sampling import TokenParams, sample
from twotower.decoding.unmasking import Blocks, StepParams, unmask, unmask_at

PROBABILITIES = [0.05, 0.4, 0.1, 0.25, 0.2]
FIRST = 4  # the token of the first of them
VOCAB = FIRST + len(PROBABILITIES)
BOUNDS = [Bounds(*each) for each in itertools.product([0, 1, 2, 3, 9], [1e-9, 0.3, 0.45, 0.9, 1.0], [0.0, 0.3, 1.0])]
TEMPERATURES = [0.3, 1.0, 2.5]


def _logits(count: int) -> Tensor:
    """One position each; the mask token is the likeliest, if it were let in."""
    logits = torch.full((count, 1, VOCAB), -1e9)
    logits[:, 0, FIRST:] = torch.tensor(PROBABILITIES).log()
    logits[:, 0, MASK_TOKEN_ID] = 5.0
    return logits


def _left(bounds: Bounds, temperature: float) -> dict[int, float]:
    """By hand, in Python's floats: each token that may be drawn, and how likely that is."""
    weights = {FIRST + i: p ** (1 / temperature) for i, p in enumerate(PROBABILITIES)}
    order = sorted(weights, key=lambda token: -weights[token])
    order = order[: bounds.top_k or VOCAB]
    order = [token for token in order if weights[token] >= bounds.min_p * weights[order[0]]]
    total, kept = sum(weights[token] for token in order), list[int]()
    while len(kept) < len(order) and (bounds.top_p == 1 or sum(weights[t] for t in kept) / total < bounds.top_p):
        kept.append(order[len(kept)])
    return {token: weights[token] / sum(weights[t] for t in kept) for token in kept}


def _tokens(rows: list[StepParams]) -> list[int]:
    return [token for row in decide(_logits(len(rows)), fresh(1, rows)) for token in row.tokens]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_every_draw_is_the_gumbel_maximum_among_the_tokens_that_are_left(temperature: float) -> None:
    """Of every combination, exactly, by the random numbers themselves."""
    keys = [key * 104729 + 3 for key in range(40)]
    asked = [(bounds, key) for bounds in BOUNDS for key in keys]
    numbers = uniform([key for _, key in asked], [0] * len(asked), VOCAB, CPU).tolist()
    got = decide(
        _logits(len(asked)), fresh(1, [StepParams(0.8, 1, temperature, key, bounds=bounds) for bounds, key in asked])
    )
    sets = {bounds: _left(bounds, temperature) for bounds in BOUNDS}
    for (bounds, _), u, decision in zip(asked, numbers, got, strict=True):
        left = sets[bounds]
        scores = {t: math.log(p) - math.log(-math.log(max(u[t], 1e-10))) for t, p in left.items()}
        [token] = decision.tokens
        assert token == max(left, key=lambda t: scores[t])
        assert decision.confidence == pytest.approx([PROBABILITIES[token - FIRST]], rel=1e-5), "of all, at 1"


@pytest.mark.parametrize("bounds", [Bounds(3), Bounds(0, 0.9), Bounds(0, 1.0, 0.3), Bounds(4, 0.7, 0.2)])
def test_it_follows_the_distribution_that_ar_draws_from(bounds: Bounds) -> None:
    """Chi-square at one in ten thousand."""
    count, temperature = 3000, 1.5
    keys = [key * 7919 + 1 for key in range(count)]
    ours = _tokens([StepParams(0.8, 1, temperature, key, bounds=bounds) for key in keys])
    logits = _logits(1)[:, 0].expand(count, -1).clone()
    logits[:, MASK_TOKEN_ID] = -1e9
    rows = [TokenParams(temperature, bounds.top_k, bounds.top_p, key, bounds.min_p) for key in keys]
    left = _left(bounds, temperature)
    for drawn in (ours, sample(logits, rows).tokens_R.tolist()):
        assert set(drawn) == left.keys()
        off = sum((drawn.count(token) - count * p) ** 2 / (count * p) for token, p in left.items())
        assert off < {1: 15.2, 2: 18.5, 3: 21.2, 4: 23.6}[len(left) - 1]


@pytest.mark.parametrize("bounds", [Bounds(1), Bounds(0, 1e-9), Bounds(0, 1.0, 1.0), Bounds(1, 1e-9, 1.0)])
def test_the_tightest_bounds_give_the_greedy_step(bounds: Bounds) -> None:
    logits = 4 * torch.randn(6, 16, 64, generator=torch.Generator().manual_seed(1))
    rows = [StepParams(0.6, 5, 1.3, key=row, bounds=bounds) for row in range(6)]
    greedy = decide(logits, fresh(16, [StepParams(0.6, 5)] * 6))
    for mine, wanted in zip(decide(logits, fresh(16, rows)), greedy, strict=True):
        assert (mine.tokens, mine.committed, mine.confidence) == (wanted.tokens, wanted.committed, wanted.confidence)
        assert 0 < mine.margin <= 1


def test_without_a_temperature_they_change_nothing() -> None:
    logits = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(2))
    free, bounded = ([StepParams(0.3, 4, bounds=b)] * 4 for b in (UNBOUNDED, Bounds(2, 0.5, 0.3)))
    assert fresh(8, bounded).plain, "it goes the recorded way"
    assert torch.equal(unmask(logits.clone(), fresh(8, bounded)), unmask(logits.clone(), fresh(8, free)))


def test_bounds_that_cut_nothing_off_change_no_token_and_nothing_of_how_sure_it_is() -> None:
    logits = torch.randn(8, 8, 32, generator=torch.Generator().manual_seed(3))
    off, wide = (
        decide(logits, fresh(8, [StepParams(0.3, 4, 0.9, key, bounds=b) for key in range(8)]))
        for b in (UNBOUNDED, Bounds(32))
    )
    for mine, wanted in zip(wide, off, strict=True):
        assert (mine.tokens, mine.committed, mine.confidence) == (wanted.tokens, wanted.committed, wanted.confidence)
        assert mine.margin == pytest.approx(wanted.margin, abs=1e-6)


def test_company_does_not_matter() -> None:
    """To the last bit: of rows that bound their draws, and of those beside them."""
    logits = 2 * torch.randn(5, 16, 50, generator=torch.Generator().manual_seed(4))
    rows = [
        StepParams(0.2, 3, 0.7, 5),
        StepParams(0.2, 3, 0.7, 5, bounds=Bounds(3)),
        StepParams(0.2, 3),
        StepParams(0.2, 3, 1.9, 8, bounds=Bounds(0, 0.6)),
        StepParams(0.2, 3, 1e-4, 9, bounds=Bounds(7, 0.9, 0.05)),
    ]
    together = unmask(logits.clone(), fresh(16, rows))
    for number, row in enumerate(rows):
        assert torch.equal(unmask(logits[number : number + 1].clone(), fresh(16, [row]))[0], together[number])


def test_a_restricted_position_is_cut_after_what_may_not_come() -> None:
    """As in `ar`: its likeliest tokens are those of the ones that are left."""
    allowed = [FIRST, FIRST + 2, FIRST + 4]  # 0.05, 0.1 and 0.2
    bits = sum(1 << token for token in allowed).to_bytes(4, "little")
    for bounds, wanted in ((Bounds(2), {FIRST + 2, FIRST + 4}), (Bounds(0, 0.5), {FIRST + 4})):
        draws = [Draw([1.0], [key], [0], [bounds]) for key in range(200)]
        got = set()
        for draw in draws:
            logits = _logits(1)[0]
            guesses.restrict(logits, [(0, bits)])
            token, confidence, _, _ = guesses.drawn(logits, MASK_TOKEN_ID, draw)[0].tolist()
            got.add(int(token))
            assert confidence == pytest.approx(PROBABILITIES[int(token) - FIRST] / 0.35, rel=1e-5)
        assert got == wanted


def test_a_kernel_gets_no_draw_that_is_bounded_and_the_others_as_before() -> None:
    logits = torch.randn(3 * 16, 40, generator=torch.Generator().manual_seed(5)).bfloat16()
    rows = [StepParams(0.3, 4), StepParams(0.3, 4, 0.7, 5, bounds=Bounds(3)), StepParams(0.3, 4, 0.7, 5)]
    given: list[Draw | None] = []

    def kernel(logits_PV: Tensor, mask_token_id: int, draw: Draw | None) -> Tensor:
        assert logits_PV.dtype is torch.bfloat16
        given.append(draw)
        return _as_a_kernel(logits_PV, mask_token_id, draw)

    outcome = unmask_at(logits.__getitem__, fresh(16, rows), 16, 40, CPU, guess=kernel)
    assert [None if draw is None else draw.bounds for draw in given] == [None, None]
    wanted = unmask(logits.float().view(3, 16, 40), fresh(16, rows))
    assert torch.equal(outcome, wanted)


def _as_a_kernel(logits_PV: Tensor, mask_token_id: int, draw: Draw | None) -> Tensor:
    fp32_PV = logits_PV.to(torch.float32, copy=True)
    if draw is None:
        return guesses.likeliest(fp32_PV, mask_token_id)
    return guesses.drawn(fp32_PV, mask_token_id, draw)


def test_what_takes_more_memory_is_looked_at_in_smaller_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [StepParams(0.3, 4), StepParams(0.3, 4, 0.7, 5), StepParams(0.3, 4, 0.7, 5, bounds=Bounds(3))]
    pieces = [*fresh(16, rows).pieces(16, 8)]
    assert [len(piece.places) for piece in pieces] == [8, 8, 8, 8, *[2] * 8]
    assert guesses.bounded_at_once(1) == 1


def test_margins_tell_of_the_ends_of_the_sets() -> None:
    """Two tokens as likely as each other at the end of a set: who is drawn among them hangs on their last bits."""

    def margins(bounds: Bounds, probabilities: list[float]) -> list[float]:
        logits = torch.full((300, 1, VOCAB), -1e9)
        logits[:, 0, FIRST : FIRST + len(probabilities)] = torch.tensor(probabilities).log()
        rows = [StepParams(0.0, 1, 1.0, key * 7919, bounds=bounds) for key in range(300)]
        return [row.margin for row in decide(logits, fresh(1, rows))]

    def share(found: list[float]) -> float:
        return sum(margin < NEAR_TIE for margin in found) / len(found)

    tied = [0.7, 0.1000005, 0.1, 0.0999995]
    # The second is cut off or not by its last bits, with top-k 2: where it is drawn, or the third had been.
    assert 0.1 < share(margins(Bounds(2), tied)) < 0.6
    assert share(margins(Bounds(0, 0.75), tied)) > 0.1
    assert share(margins(Bounds(0, 0.7000001), [0.4, 0.3, 0.2, 0.1])) > 0.2, "the sum at which top-p crosses"
    assert share(margins(Bounds(0, 1.0, 1 / 7), tied)) > 0.1
    assert share(margins(Bounds(3), [0.4, 0.3, 0.2, 0.1])) == 0
    assert share(margins(UNBOUNDED, tied)) == 0


def test_a_row_that_is_not_finite_says_so_and_leaves_the_others_alone() -> None:
    logits = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(6))
    rows = [StepParams(0.3, 3, 0.8, 1, bounds=Bounds(3, 0.9, 0.1))] * 2
    wanted = decide(logits, fresh(4, rows))[0].tokens
    for bad in (math.nan, math.inf, -math.inf):
        logits[1, :, 9] = bad
        fine, broken = decide(logits, fresh(4, rows))
        assert (fine.finite, broken.finite, fine.tokens) == (True, False, wanted)


def test_blocks_tell_who_bounds_a_draw() -> None:
    assert not StepParams(0.3, 1, 0.0, bounds=Bounds(3)).is_bounded
    assert StepParams(0.3, 1, 0.5, bounds=Bounds(3)).is_bounded
    assert not StepParams(0.3, 1, 0.5).is_bounded and not Blocks([[5]], [[True]], [StepParams(0.3, 1, 0.5)]).plain
