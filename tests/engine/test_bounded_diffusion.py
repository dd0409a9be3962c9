"""`diffusion` with top-k, top-p and min-p: through the mode, and through the demo's engines."""

from dataclasses import replace
from typing import Any

import pytest

from tests.decoding.languages import EOS, Language
from tests.engine.test_determinism import one_thread
from tests.engine.test_structured import _decoded, _same
from tests.engine.test_structured_diffusion import _answers
from twotower.core import DecodingParams, Floor, Mode, Request, RequestId

__all__ = ["one_thread"]  # a fixture
HOT = DecodingParams(Mode.DIFFUSION, 20, 8, 8, 0.4, temperature=1.2, seed=7)
TIGHT: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}]


@pytest.mark.parametrize("bounds", TIGHT)
@pytest.mark.parametrize("words", [None, [(5, 6, 7, 8), (5, 9), (8, 8, 8, 8, 8)]])
def test_the_tightest_bounds_are_greedy_under_a_grammar_too(
    bounds: dict[str, Any], words: list[tuple[int, ...]] | None
) -> None:
    def answer(params: DecodingParams) -> object:
        got = _answers(2.0, {0: (params, None if words is None else Language(words))})[0]
        return got.token_ids, got.num_steps, got.finish_reason

    assert answer(replace(HOT, **bounds)) == answer(replace(HOT, temperature=0.0))


def test_no_token_comes_that_is_cut_off_and_every_answer_is_a_word() -> None:
    words = [(5, 6, 7, 8), (5, 9), (8, 8, 8, 8, 8)]
    for seed in range(20):
        params = replace(HOT, top_k=2, top_p=0.9, seed=seed)
        got = _answers(0.5, {0: (params, Language(words)), 1: (params, None)})
        assert tuple(got[0].token_ids) in [(*word, EOS) for word in words]
        assert got[1] == _answers(0.5, {1: (params, None)})[1], "alone as in company"


def _request(name: str, **params: Any) -> Request:
    return Request(RequestId(name), (5, 90, 33, 200, 11), replace(HOT, ignore_eos=True, **params))


@pytest.mark.slow
def test_the_demos_engines_take_them() -> None:
    """In `diffusion`, and in `auto` with the floor `confidence`; whoever is beside."""
    auto = _request("auto", mode=Mode.AUTO, floor=Floor.CONFIDENCE, top_k=2)
    asked = [
        _request("greedy", temperature=0.0),
        _request("one", top_k=1),
        _request("free"),
        _request("bounded", top_k=3, top_p=0.8, min_p=0.01),
        auto,
        _request("as auto", top_k=2),
    ]
    together = dict(zip([request.id for request in asked], _decoded(asked), strict=True))
    assert together[RequestId("one")].token_ids == together[RequestId("greedy")].token_ids
    assert together[RequestId("free")].token_ids != together[RequestId("bounded")].token_ids
    for request in asked[2:4]:
        _same(_decoded([request])[0], together[request.id])
    # Nothing is known of passes yet, so its first answer is diffusion's.
    assert together[auto.id].token_ids == together[RequestId("as auto")].token_ids
