"""What requests do to their logits: each row against the rule by hand, drafts against one position at a time."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower.constraints import Constraint
from twotower.core import DecodingParams, Mode
from twotower.decoding.sampling import TokenParams, decide, sample
from twotower.decoding.steering import Steered, Steering, steer

VOCAB, EOS = 40, 2
STRUCTURED = DecodingParams(Mode.AR, structured_outputs=Constraint("regex", "a|b"))


def _params(**given: Any) -> DecodingParams:
    return DecodingParams(Mode.AR, **given)


def _by_hand(logits: Sequence[float], params: DecodingParams, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """vLLM's order: biases, repetition, frequency, presence, then the tokens that may not come yet."""
    counts, out = Counter(answer), list(logits)
    for token, bias in params.logit_bias:
        out[token] += bias
    for token in {*prompt, *answer}:
        out[token] = (
            out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
        )
    for token, count in counts.items():
        out[token] -= params.frequency_penalty * count + params.presence_penalty
    if len(answer) < params.min_tokens:
        for token in {*params.stop_token_ids, *([] if params.ignore_eos else [EOS])}:
            out[token] = -torch.inf
    return torch.tensor(out)


def _any_params(draw: random.Random) -> DecodingParams:
    return _params(
        logit_bias=tuple(
            (token, draw.uniform(-9, 9)) for token in sorted(draw.sample(range(VOCAB), draw.choice([0, 3])))
        ),
        presence_penalty=draw.choice([0.0, 1.5, -1.0]),
        frequency_penalty=draw.choice([0.0, 0.7, -2.0]),
        repetition_penalty=draw.choice([1.0, 1.3, 0.5]),
        min_tokens=draw.choice([0, 4, 9]),
        stop_token_ids=draw.choice([(), (7, 9)]),
        ignore_eos=draw.random() < 0.3,
    )


@pytest.mark.parametrize("number", range(20))
@pytest.mark.slow
def test_each_position_of_a_draft_has_what_the_rule_gives_behind_the_drafts_beginning(number: int) -> None:
    """Several sequences a pass, some of which ask for nothing; drafts cut where a pass is; the answers go on."""
    draw = random.Random(number)
    logits_RV = torch.randn(30, VOCAB, generator=torch.Generator().manual_seed(number)) * 3
    rows, wanted = list[Steered | None](), list[Tensor]()
    while len(rows) < 30:
        params = _any_params(draw)
        if not params.steers:
            rows.append(None)
            wanted.append(logits_RV[len(rows) - 1])
            continue
        prompt, answer, more, draft = ([draw.randrange(VOCAB) for _ in range(draw.choice([0, 1, 6]))] for _ in range(4))
        steering = Steering(params, EOS, prompt, answer)
        steering.follow(more)
        first = draw.randrange(len(draft) + 1)
        for ahead in range(first, min(len(draft) + 1, first + 30 - len(rows))):
            wanted.append(_by_hand(logits_RV[len(rows)].tolist(), params, prompt, [*answer, *more, *draft[:ahead]]))
            rows.append(Steered(steering, draft, ahead))
    before_RV = logits_RV.clone()
    torch.testing.assert_close(steer(logits_RV, rows), torch.stack(wanted), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_RV, before_RV)


def test_a_draft_has_the_very_bits_of_one_position_at_a_time() -> None:
    """`verified` is to give `ar`'s tokens, so nothing may be added up in another order."""
    params = _params(frequency_penalty=0.3, presence_penalty=0.1, repetition_penalty=1.1, logit_bias=((5, 0.7),))
    logits_RV, draft = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(1)), [5, 5, 9, 5, 9, 1, 5, 5]
    one = Steering(params, EOS, [9], [5, 3])
    together_RV = steer(logits_RV, [Steered(one, draft, ahead) for ahead in range(9)])
    other = Steering(params, EOS, [9], [5, 3])
    for ahead in range(9):
        assert torch.equal(steer(logits_RV[ahead][None], [Steered(other)])[0], together_RV[ahead])
        other.follow(draft[ahead : ahead + 1])


def test_rows_that_ask_for_nothing_cost_nothing() -> None:
    logits_RV = torch.randn(3, VOCAB)
    assert steer(logits_RV, [None, None, None]) is logits_RV


def test_the_choice_is_made_among_the_changed_logits_and_the_towers_own_are_judged() -> None:
    """-inf for a token that may not come is no fault of the tower's."""
    logits_RV = torch.zeros(2, VOCAB)
    logits_RV[:, EOS], logits_RV[:, 8], logits_RV[1, 9] = 5, 4, torch.nan
    held = Steered(Steering(_params(min_tokens=1), EOS, [], []))
    [token, margin, finite], [_, _, broken] = decide(logits_RV, [TokenParams(steered=held)] * 2).tolist()
    assert (token, finite, broken) == (8, 1, 0) and margin == pytest.approx(1 - torch.exp(torch.tensor(-4.0)).item())


class _Grammar:
    """A text of one token, which may be 3 or 33."""

    fault: str | None = None

    def follow(self, tokens: Sequence[int]) -> None:
        self.fault = "broken" if tokens else None

    def masks(self, draft: Sequence[int], first: int, count: int) -> list[bytes]:
        return [bytes([8, 0, 0, 0, 2, 0, 0, 0])] * count


def test_only_tokens_that_the_grammar_has_a_place_for_may_come() -> None:
    logits_RV, grammar = torch.zeros(2, VOCAB), _Grammar()
    steered_RV = steer(logits_RV, [None, Steered(Steering(STRUCTURED, EOS, [], [], grammar))])
    assert torch.isfinite(steered_RV).nonzero()[VOCAB:].tolist() == [[1, 3], [1, 33]]
    assert torch.isfinite(steered_RV[0]).all()


def test_where_no_token_may_come_none_is_chosen() -> None:
    """The row says so as one with logits that are no numbers does; the rows beside it have theirs."""
    broken = Steering(STRUCTURED, EOS, [], [5], _Grammar())
    rows = [TokenParams(), TokenParams(steered=Steered(broken)), TokenParams(0.7, key=3, steered=Steered(broken))]
    assert [row[2] for row in decide(torch.zeros(3, VOCAB), rows).tolist()] == [1, 0, 0] and broken.fault == "broken"


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_cannot_be_drawn_from_harms_no_other_and_is_told(cut: dict[str, float], wrong: float) -> None:
    logits_RV = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    rows = [TokenParams(1.0, key=5, **cut) for _ in range(3)]  # type: ignore[arg-type]
    alone = decide(logits_RV, rows)
    logits_RV[1, 7] = wrong
    beside = decide(logits_RV, rows)
    assert beside[:, 2].tolist() == [1, 0, 1] and torch.equal(beside[[0, 2]], alone[[0, 2]])


def test_a_quotient_beyond_fp32_draws_the_likeliest() -> None:
    logits_RV = torch.tensor([[0.0, 3e37, 1e37, -5.0]])
    [[token, _, finite]] = decide(logits_RV, [TokenParams(1e-4, key=5, top_p=0.9)]).tolist()
    assert (token, finite) == (1, 1)


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_row_in_which_no_token_may_be_is_sampled_without_harm(cut: dict[str, float]) -> None:
    logits_RV = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    rows = [TokenParams(1.0, key=5, **cut) for _ in range(2)]  # type: ignore[arg-type]
    alone = sample(logits_RV, rows).tokens_R
    logits_RV[0] = -torch.inf
    assert sample(logits_RV, rows).tokens_R[1] == alone[1]
