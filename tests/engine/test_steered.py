"""Requests that change their logits: `verified` and `auto` give `ar`'s tokens, and a resumed one goes on with them."""

import random
from dataclasses import replace

import pytest

from tests.engine.arrangements import ARRANGEMENTS, alone
from tests.engine.decode import Decoded, decode_all
from tests.engine.test_determinism import CHECKPOINTS, one_thread, prompt_for, towers_of
from tests.goldens import golden
from twotower.core import DecodingParams, FinishReason, Mode, Request, RequestId
from twotower.decoding.margins import NEAR_TIE

__all__ = ["one_thread"]  # a fixture
CAUSAL = (Mode.AR, Mode.MOCK_AR, Mode.VERIFIED, Mode.AUTO)


def _params(draw: random.Random, vocab: int, new: int = 24) -> DecodingParams:
    """Of tiny towers whose logits are close together: small changes already change the tokens."""
    return DecodingParams(
        Mode.AR,
        new,
        temperature=draw.choice([0.0, 0.0, 0.5, 1.0]),
        top_p=draw.choice([1.0, 0.9]),
        min_p=draw.choice([0.0, 0.0, 0.05]),
        seed=draw.randrange(2**53),
        min_tokens=draw.choice([0, 5, new]),
        logit_bias=tuple((token, draw.uniform(-3, 3)) for token in sorted(draw.sample(range(vocab), 5))),
        presence_penalty=draw.choice([0.0, 0.4, -0.3]),
        frequency_penalty=draw.choice([0.0, 0.5, 2.0]),
        repetition_penalty=draw.choice([1.0, 1.2]),
        stop_token_ids=tuple(draw.sample(range(vocab), 6)),
    )


def _same(got: Decoded, wanted: Decoded) -> bool:
    """Whether they are equal; a difference needs a near-tie."""
    assert got.margin is not None and wanted.margin is not None
    same = (got.token_ids, got.finish_reason) == (wanted.token_ids, wanted.finish_reason)
    assert same or min(got.margin, wanted.margin) < NEAR_TIE, (got, wanted)
    return same


@pytest.mark.parametrize("name", ["tt_dense", pytest.param("tt_moe", marks=pytest.mark.slow)])
def test_verified_and_auto_give_ars_tokens_and_so_does_one_that_goes_on(name: str) -> None:
    model, draw = golden(name), random.Random(name)
    vocab = model.context.config.vocab_size
    asked = [
        Request(
            RequestId(f"{n}"), tuple(draw.randrange(vocab) for _ in range(draw.choice([1, 9]))), _params(draw, vocab)
        )
        for n in range(6)
    ]
    wanted = decode_all(model.context, model.denoiser, asked)
    again, expected = list[Request](), list[Decoded]()
    for request, whole in zip(asked, wanted, strict=True):
        for mode in (Mode.VERIFIED, Mode.AUTO):
            for cut in {0, len(whole.token_ids) // 2}:
                params = replace(
                    request.params, mode=mode, draft_steps=draw.choice([1, 3]), block_size=draw.choice([4, 16])
                )
                committed = tuple(whole.token_ids[:cut])
                again.append(
                    Request(RequestId(f"{request.id} {mode} {cut}"), request.prompt_token_ids, params, 0, committed)
                )
                expected.append(whole)
    results = decode_all(model.context, model.denoiser, again)
    assert sum(map(_same, results, expected)) >= len(again) - 1


def test_each_parameter_changes_the_tokens() -> None:
    """Beside the plain request, in one batch."""
    model = golden("tt_dense")
    changes = [{}, {"presence_penalty": 2.0}, {"frequency_penalty": -2.0}, {"repetition_penalty": 5.0}]
    plain = DecodingParams(Mode.AR, 16, ignore_eos=True)
    requests = [Request(RequestId(f"{n}"), (5, 6, 7), replace(plain, **change)) for n, change in enumerate(changes)]
    results = decode_all(model.context, model.denoiser, requests)
    first = results[0].token_ids[0]
    [biased] = decode_all(
        model.context, None, [Request(RequestId("b"), (5, 6, 7), replace(plain, logit_bias=((first, -100.0),)))]
    )
    [unhindered] = decode_all(model.context, None, requests[:1])
    assert unhindered.token_ids == results[0].token_ids and first not in biased.token_ids
    assert len({tuple(result.token_ids) for result in results}) == len(changes)


@pytest.mark.parametrize("mode", CAUSAL)
def test_no_end_before_so_many_tokens(mode: Mode) -> None:
    """With a stop token that would come at once."""
    model = golden("tt_dense")
    plain = DecodingParams(mode, 12, ignore_eos=True)
    [free] = decode_all(model.context, model.denoiser, [Request(RequestId("free"), (5, 6, 7), plain)])
    stops = tuple(sorted(set(free.token_ids)))
    params = replace(plain, stop_token_ids=stops)
    asked = [Request(RequestId(f"{n}"), (5, 6, 7), replace(params, min_tokens=n)) for n in (0, 1, 5, 12)]
    results = decode_all(model.context, model.denoiser, asked)
    assert results[0].token_ids == free.token_ids[:1] and results[0].finish_reason is FinishReason.STOP
    for request, result in zip(asked, results, strict=True):
        held = result.token_ids[: request.params.min_tokens]
        assert len(held) == request.params.min_tokens and not set(held) & set(stops)


@pytest.mark.slow
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_in_company_and_apart(name: str, arrangement: str) -> None:
    towers, draw = towers_of(name), random.Random(f"{name} {arrangement}")
    requests = []
    for number in range(8):
        params = replace(_params(draw, towers.config.vocab_size), mode=draw.choice(CAUSAL))
        requests.append(Request(RequestId(str(number)), prompt_for(towers, draw), params))
    as_ar = [
        replace(r, params=r.params if r.params.mode is Mode.MOCK_AR else replace(r.params, mode=Mode.AR))
        for r in requests
    ]
    wanted, got = alone(towers, as_ar), ARRANGEMENTS[arrangement](towers, requests, draw)
    assert sum(_same(got[r.id], wanted[r.id]) for r in requests) >= 7
