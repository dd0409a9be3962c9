"""Verifying is exact speculative sampling: answers are distributed as those of `ar`, whatever was drafted."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from twotower.core import DecodingParams, Mode
from twotower.decoding import sampling
from twotower.decoding.sampling import TokenParams, decide
from twotower.decoding.verifying import Verdict, places, verdict

Answer = tuple[int, ...]
Numbers = tuple[int, ...]

VOCAB, PLACES, GRID = 3, 3, 12
# Twelfths: the probabilities of the next token after each last one and the place, so that prefixes matter.
TABLE = {
    (last, place): weights
    for (last, place), weights in zip(
        product(range(VOCAB), range(PLACES)),
        [(6, 3, 3), (1, 4, 7), (0, 6, 6), (12, 0, 0), (2, 2, 8), (5, 5, 2), (3, 0, 9), (4, 4, 4), (1, 10, 1)],
        strict=True,
    )
}


def _logits(rows: list[tuple[int, int]]) -> Tensor:
    weights = torch.tensor([TABLE[row] for row in rows]).float()
    return (weights / GRID).log().clamp(min=-100)


def _round(draft: Sequence[int], answers: dict[Numbers, Answer]) -> dict[Numbers, Answer]:
    """The answers after one round more of each, all in one decision."""
    going = {numbers: answer for numbers, answer in answers.items() if len(answer) < PLACES}
    blocks = {n: ((answer or (0,))[-1], *draft[: PLACES - len(answer) - 1]) for n, answer in going.items()}
    at = [(n, len(going[n]) + place, token) for n, block in blocks.items() for place, token in enumerate(block)]
    params = [TokenParams(1.0, key=numbers[place]) for numbers, place, _ in at]
    chosen = iter(decide(_logits([(token, place) for _, place, token in at]), params).tolist())
    verdicts = {n: verdict(block, [next(chosen) for _ in block]) for n, block in blocks.items()}
    return answers | {n: (*going[n], *blocks[n][1 : one.cut], one.token) for n, one in verdicts.items()}


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's random number is its key's place on a grid: all of them can be gone through."""

    def numbers(keys: list[int], positions: list[int], vocab: int, device: torch.device) -> Tensor:
        return torch.tensor([(key + 0.5) / GRID for key in keys]).view(-1, 1)

    monkeypatch.setattr(sampling, "uniform", numbers)


@pytest.mark.slow
def test_every_answer_is_as_likely_as_it_is_in_ar(grid: None) -> None:
    """Exhaustively: every draft, with every combination of random numbers, over three tokens and three places."""
    expected = {}
    for answer in product(range(VOCAB), repeat=PLACES):
        steps = zip((0, *answer), answer, range(PLACES), strict=False)
        expected[answer] = math.prod(TABLE[last, place][token] for last, token, place in steps)
    for draft in product(range(VOCAB), repeat=PLACES - 1):
        answers: dict[Numbers, Answer] = dict.fromkeys(product(range(GRID), repeat=PLACES), ())
        for _ in range(PLACES):
            answers = _round(draft, answers)
        found = Counter(answers.values())
        assert found == {answer: count for answer, count in expected.items() if count}, draft


@pytest.mark.parametrize("draft", list(product(range(2), repeat=2)))
@pytest.mark.parametrize("tokens", list(product(range(2), repeat=3)))
def test_the_longest_beginning_that_ar_would_have_written(draft: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    chosen = [(token, 1.0 - place / 10, True) for place, token in enumerate(tokens)]
    one = verdict((7, *draft), chosen)
    as_long = [n for n in range(3) if draft[:n] == tokens[:n]]
    assert one == Verdict(max(as_long) + 1, tokens[max(as_long)], 1.0 - max(as_long) / 10, True)


def test_what_lies_beyond_the_cut_counts_for_nothing() -> None:
    assert verdict((7, 1, 1), [(2, 0.5, True), (1, 0.0, False), (1, 0.0, False)]) == Verdict(1, 2, 0.5, True)
    assert not verdict((7, 2, 1), [(2, 0.5, True), (0, 0.0, False), (1, 0.5, True)]).finite


def test_a_guess_stands_with_its_probability_and_else_is_drawn_from_the_others() -> None:
    """Chi-square, over many random numbers: of the token that comes out, and of it where the guess fell."""
    draws, vocab = 20_000, 40
    logits_V = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 1.5
    params = DecodingParams(Mode.VERIFIED, temperature=0.9, seed=77)
    rows = places(params, 5, draws)
    assert rows == [TokenParams.of(params, place) for place in range(5, 5 + draws)]
    p_V = (logits_V / 0.9).softmax(-1)
    guess = int(p_V.argsort(descending=True)[1])
    chosen = decide(logits_V.expand(draws, -1), rows).tolist()
    found = [verdict((0, guess), [one, (0.0, 1.0, 1.0)]) for one in chosen]
    accepted = sum(one.cut == 2 for one in found)
    p = float(p_V[guess])
    assert abs(accepted - draws * p) < 4 * math.sqrt(draws * p * (1 - p))
    residual_V = p_V.clone()
    residual_V[guess] = 0
    others = Counter(one.token for one in found if one.cut == 1)
    assert others[guess] == 0
    _fits(others, residual_V / residual_V.sum())
    _fits(Counter(guess if one.cut == 2 else one.token for one in found), p_V)


def _fits(found: Counter[int], p_V: Tensor) -> None:
    """Pearson's statistic is within five of its standard deviations; rare tokens are counted together."""
    draws = sum(found.values())
    rare = [token for token in range(len(p_V)) if draws * p_V[token] < 10]
    cells = [(found[token], draws * float(p_V[token])) for token in range(len(p_V)) if token not in rare]
    cells += [(sum(found[token] for token in rare), draws * float(p_V[rare].sum()))] if rare else []
    statistic = sum((got - wanted) ** 2 / wanted for got, wanted in cells if wanted)
    freedom = len(cells) - 1
    assert freedom > 10 and statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_greedy_rows_need_no_random_number() -> None:
    assert places(DecodingParams(Mode.VERIFIED, seed=5), 9, 3) == [TokenParams()] * 3
