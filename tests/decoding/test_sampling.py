"""The causal modes' next token: greedy, temperature, top-k and top-p, each row for itself."""

import pytest
import torch
from torch import Tensor

from twotower.decoding.sampling import TokenParams, sample

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = PROBABILITIES.log()
DRAWS = 4000


def _draws(params: list[TokenParams], logits: Tensor = LOGITS) -> Tensor:
    return sample(logits.expand(len(params), -1), params).tokens_R


def _frequencies(**how: float) -> Tensor:
    rows = [TokenParams(key=key * 7919 + 1, **how) for key in range(DRAWS)]  # type: ignore[arg-type]
    return torch.bincount(_draws(rows), minlength=5) / DRAWS


def _wanted(kept: list[int], temperature: float = 1.0) -> Tensor:
    weights = PROBABILITIES ** (1 / temperature)
    mask = torch.zeros(5)
    mask[kept] = 1
    return weights * mask / (weights * mask).sum()


def test_greedy_takes_the_first_of_equals() -> None:
    assert _draws([TokenParams()]).tolist() == [1]
    assert _draws([TokenParams()], torch.tensor([0.0, 2.0, 2.0])).tolist() == [1]


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"temperature": 1.0}, _wanted([0, 1, 2, 3, 4])),
        ({"temperature": 0.5}, _wanted([0, 1, 2, 3, 4], 0.5)),
        ({"temperature": 1.0, "top_k": 2}, _wanted([1, 3])),
        ({"temperature": 1.0, "top_k": 1}, _wanted([1])),
        ({"temperature": 1.0, "top_k": 10_000}, _wanted([0, 1, 2, 3, 4])),
        ({"temperature": 1.0, "top_p": 0.39}, _wanted([1])),
        ({"temperature": 1.0, "top_p": 0.41}, _wanted([1, 3])),  # the crossing token is kept
        ({"temperature": 1.0, "top_p": 0.9}, _wanted([1, 2, 3, 4])),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, _wanted([1, 3])),  # top-p of what top-k left
    ],
)
def test_frequencies(how: dict[str, float], wanted: Tensor) -> None:
    frequencies = _frequencies(**how)
    assert (frequencies - wanted).abs().max().item() < 0.03
    assert not frequencies[wanted == 0].any()


def test_top_k_keeps_ties() -> None:
    tied = torch.tensor([1.0, 1.0, 1.0, -5.0])
    drawn = sample(tied.expand(300, -1), [TokenParams(1.0, top_k=2, key=key) for key in range(300)]).tokens_R
    assert set(drawn.tolist()) == {0, 1, 2}


def test_same_key_same_token_whoever_shares_the_batch() -> None:
    logits = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    rows = [TokenParams(0.3 * (r % 4), r % 7, 1 - 0.1 * (r % 3), key=r) for r in range(40)]
    together = sample(logits, rows).tokens_R
    alone = [sample(logits[r : r + 1], rows[r : r + 1]).tokens_R.item() for r in range(40)]
    assert together.tolist() == alone


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e-10, 9e-6, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([3.0, -80.0, 70.0, 69.0])
    assert _draws([TokenParams(temperature, key=key) for key in range(50)], logits).tolist() == [2] * 50
