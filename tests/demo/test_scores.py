"""Accuracies, ratios and intervals, against numbers worked out by hand."""

import pytest

from twotower.core import Mode
from twotower.demo.scores import (
    AR,
    USUAL,
    Answer,
    Score,
    Way,
    every_way,
    from_json,
    mean_accuracy,
    of_way,
    retained,
    steps_by_block,
    table,
    to_json,
    tokens_per_step,
)


def _score(family: str, way: Way, right: list[bool], tokens: int = 20, steps: tuple[int, ...] = (3, 2)) -> Score:
    return Score(family, str(way), tuple(Answer(each, tokens, steps) for each in right))


SCORES = [
    _score("easy", AR, [True] * 10, 20, (1,) * 20),
    _score("easy", USUAL, [True] * 9 + [False]),
    _score("hard", AR, [True] * 5 + [False] * 5, 20, (1,) * 20),
    _score("hard", USUAL, [True] * 4 + [False] * 6),
]


def test_ways_are_named_and_ask_for_what_they_say() -> None:
    names = [str(way) for way in every_way()]
    assert names[:5] == ["ar", "mock_ar", "diffusion 0.5", "diffusion 0.6", "diffusion 0.7"]
    assert names[-3:] == ["diffusion 1", "diffusion 0.8 T 4", "diffusion 0.8 T 8"]
    assert len(set(names)) == len(names) == 11
    params = Way(Mode.DIFFUSION, 0.8, 4).params()
    assert (params.confidence_threshold, params.steps_per_block, params.max_new_tokens) == (0.8, 4, 256)


def test_tokens_per_step_and_steps_by_block() -> None:
    scores = [_score("a", USUAL, [True, True], 20, (4, 1)), _score("b", USUAL, [True], 10, (2,))]
    assert tokens_per_step(scores) == 50 / 12
    assert steps_by_block(scores) == [(pytest.approx(10 / 3), 3), (1.0, 2)]


def test_retained_is_a_ratio_of_means_and_a_mean_of_ratios() -> None:
    kept = retained(of_way(SCORES, USUAL), of_way(SCORES, AR))
    assert mean_accuracy(of_way(SCORES, AR)) == 0.75
    assert kept.of_means.value == pytest.approx(0.65 / 0.75)
    assert kept.mean_of_ratios.value == pytest.approx((0.9 + 0.8) / 2)
    assert kept.of_means.low < kept.of_means.value < kept.of_means.high


def test_the_same_answers_keep_everything_but_few_of_them_prove_little() -> None:
    """Fifteen of fifteen right answers kept: a share of 78 % does that in one case of forty."""
    kept = retained(of_way(SCORES, AR), of_way(SCORES, AR))
    assert kept.of_means == kept.mean_of_ratios == (1.0, pytest.approx(0.025 ** (1 / 15)), 1.0)


def test_the_interval_is_that_of_the_differences_not_of_the_instances() -> None:
    """The same instances are drawn for both: what both get wrong adds no doubt."""
    wrong_together = [True] * 50 + [False] * 50
    one_less = [False, *wrong_together[1:]]
    kept = retained([_score("a", USUAL, one_less)], [_score("a", AR, wrong_together)]).of_means
    assert kept.value == pytest.approx(0.98)
    assert 0.9 < kept.low < kept.value < kept.high == 1.0


def test_the_table_has_a_row_per_family_and_their_mean() -> None:
    rows = table(SCORES).splitlines()
    assert rows[0] == "| family | ar | tokens/step | diffusion 0.8 | tokens/step |"
    assert rows[2] == "| easy | 100.0 % | 1.00 | 90.0 % | 4.00 |"
    assert rows[-1] == "| mean | 75.0 % | 1.00 | 65.0 % | 4.00 |"


def test_a_score_is_read_back() -> None:
    assert [from_json(to_json(score)) for score in SCORES] == SCORES
