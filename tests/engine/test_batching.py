"""A request's tokens do not depend on who shares its batch, nor on how its prompt is cut into chunks."""

import random
from dataclasses import replace

import pytest

from tests.engine.decode import SETTINGS, Decoded, decode_all
from tests.goldens import MODELS, golden
from twotower.core import DecodingParams, FinishReason, Mode, Request, RequestId

NAMES = pytest.mark.parametrize("name", MODELS)


def _mixed(name: str, seed: int, count: int) -> list[Request]:
    """Requests of all modes that differ in everything."""
    rng, vocab = random.Random(seed), golden(name).checkpoint.config.vocab_size
    requests = []
    for number in range(count):
        mode = list(Mode)[number % 4]
        block = 16 if mode.by_token else rng.choice([1, 3, 8, 16, 32])
        params = DecodingParams(
            mode,
            rng.choice([1, 5, 17, 24]),
            block,
            rng.choice([1, 2, block, 40]),
            rng.choice([0.0, 0.1, 0.5, 0.8, 1.0]),
            temperature=rng.choice([0.0, 0.0, 0.5, 1.0]),
            top_k=rng.choice([0, 3]),
            top_p=rng.choice([1.0, 0.7]),
            seed=rng.randrange(2**53),
            stop_token_ids=tuple(rng.sample(range(vocab), rng.choice([0, 0, 6]))),
            ignore_eos=rng.random() < 0.7,
        )
        prompt = tuple(rng.randrange(vocab) for _ in range(rng.choice([1, 1, 2, 15, 16, 17, 40, 70])))
        requests.append(Request(RequestId(str(number)), prompt, params))
    return requests


def _content(requests: list[Request], results: list[Decoded]) -> list[tuple[object, ...]]:
    """In `verified` and `auto` the cost may change, but no token: rounding changes a draft, the load a choice."""
    return [
        (
            d.token_ids,
            d.finish_reason,
            *([] if r.params.mode in (Mode.VERIFIED, Mode.AUTO) else [d.num_steps, d.num_blocks]),
        )
        for r, d in zip(requests, results, strict=True)
    ]


@NAMES
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_mixed_requests_together_are_each_alone(name: str, seed: int) -> None:
    model, requests = golden(name), _mixed(name, seed, 15)
    together = decode_all(model.context, model.denoiser, requests)
    # In another order, so that slots, pages and numbers differ too.
    alone = decode_all(model.context, model.denoiser, requests[::-1], together=False)[::-1]
    assert _content(requests, together) == _content(requests, alone)
    for request, result in zip(requests, alone, strict=True):
        assert 0 < len(result.token_ids) <= request.params.max_new_tokens
        if result.finish_reason is FinishReason.LENGTH:
            assert len(result.token_ids) == request.params.max_new_tokens


def test_the_mixed_requests_are_worth_their_name() -> None:
    requests = [request for name in MODELS for seed in range(4) for request in _mixed(name, seed, 15)]
    diffusion = [request.params for request in requests if request.params.mode is Mode.DIFFUSION]
    assert {p.block_size for p in diffusion} == {1, 3, 8, 16, 32}
    assert any(p.max_new_tokens % p.block_size for p in diffusion)
    assert any(p.temperature and len(r.prompt_token_ids) == 1 for r in requests for p in [r.params])


@NAMES
@pytest.mark.slow
def test_queueing_changes_nothing(name: str) -> None:
    model, requests = golden(name), _mixed(name, 9, 9)
    narrow = replace(SETTINGS, max_sequences=2)
    found = [decode_all(model.context, model.denoiser, requests, settings=each) for each in (narrow, SETTINGS)]
    assert _content(requests, found[0]) == _content(requests, found[1])


@NAMES
@pytest.mark.slow
def test_prefill_chunks_change_nothing(name: str) -> None:
    model = golden(name)
    requests = [request for request in _mixed(name, 4, 30) if len(request.prompt_token_ids) > 7][:6]
    results = []
    for chunk in (4, 7, 64):
        settings = replace(SETTINGS, prefill_chunk_tokens=chunk)
        results.append(_content(requests, decode_all(model.context, model.denoiser, requests, settings=settings)))
    assert results[0] == results[1] == results[2]
