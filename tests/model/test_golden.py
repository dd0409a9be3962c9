"""Logits and caches of both towers against the released code's, within the tolerances of the vectors' FORMAT.md."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.goldens import CPU, GOLDEN_DIR, MODELS, Golden, golden, prompt_ids
from twotower.model.cache import Span, TowerCache
from twotower.model.conditioning import sinusoid

PROMPTS = pytest.mark.parametrize(("name", "number"), prompt_ids())
LOGITS, DENOISER_LOGITS, CACHE, SSM = 1e-3, 3e-3, 2e-4, 1e-3


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.inference_mode():
        yield


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= tolerance


def _cache(model: Golden) -> tuple[TowerCache, int]:
    cache = TowerCache(model.checkpoint.config, 2, 16, CPU, torch.float32)
    return cache, cache.allocate(200)


def _read(model: Golden, cache: TowerCache, slot: int, tokens: list[int]) -> Tensor:
    states = cache.extending([slot], [len(tokens)], len(tokens))
    hidden = model.context(torch.tensor([tokens]), states)
    cache.advance(slot, len(tokens))
    return model.context.logits(hidden)[0]


def _denoise(model: Golden, cache: TowerCache, slot: int, tokens: list[int], t: float | None) -> Tensor:
    states = cache.reading([slot], [len(tokens)], len(tokens))
    t_R = None if t is None else torch.tensor([t])
    return model.denoiser.logits(model.denoiser(torch.tensor([tokens]), states, t_R))[0]


def _same_cache(model: Golden, cache: TowerCache, slot: int, prefix: str) -> None:
    config, length = model.checkpoint.config, cache.length(slot)
    for layer in config.layers_of("M"):
        row = cache.mamba_row(layer)
        _close(cache.conv[row, slot].T, model.tensors[f"{prefix}.layer{layer}.conv"], CACHE)
        _close(cache.ssm[row, slot], model.tensors[f"{prefix}.layer{layer}.ssm"], SSM)
    keys, values, *_ = cache.delta([Span(slot, 0, length)])
    for layer in config.layers_of("*"):
        row = cache.attention_row(layer)
        _close(keys[row].transpose(0, 1), model.tensors[f"{prefix}.layer{layer}.k"], CACHE)
        _close(values[row].transpose(0, 1), model.tensors[f"{prefix}.layer{layer}.v"], CACHE)


@PROMPTS
def test_prefill_and_block_extension(name: str, number: int) -> None:
    model = golden(name)
    prompt = model.prompts[number]
    cache, slot = _cache(model)
    _close(_read(model, cache, slot, prompt["tokens"]), model.tensors[f"{prompt['id']}.ctx_logits"], LOGITS)
    _same_cache(model, cache, slot, f"{prompt['id']}.cache_prefill")
    _read(model, cache, slot, prompt["ext_tokens"])
    _same_cache(model, cache, slot, f"{prompt['id']}.cache_ext16")


@PROMPTS
def test_state_before_the_last_prompt_token(name: str, number: int) -> None:
    """The mock-AR seed: what the mirror holds while it lags one token."""
    model = golden(name)
    prompt = model.prompts[number]
    cache, slot = _cache(model)
    _read(model, cache, slot, prompt["tokens"][:-1])
    for layer in model.checkpoint.config.layers_of("M"):
        row, prefix = cache.mamba_row(layer), f"{prompt['id']}.cache_prefill.layer{layer}"
        _close(cache.conv[row, slot].T, model.tensors[f"{prefix}.conv_s2"], CACHE)
        _close(cache.ssm[row, slot], model.tensors[f"{prefix}.ssm_s2"], SSM)


@PROMPTS
def test_causal_logits(name: str, number: int) -> None:
    model = golden(name)
    prompt = model.prompts[number]
    for mode in ("ar", "mock_ar"):
        cache, slot = _cache(model)
        *before, last = prompt["tokens"]
        _read(model, cache, slot, before)
        for place, wanted in enumerate(model.tensors[f"{prompt['id']}.{mode}_logits"]):
            mock = _denoise(model, cache, slot, [last], None)[0]
            ours = _read(model, cache, slot, [last])[0]
            _close(ours if mode == "ar" else mock, wanted, LOGITS)
            last = prompt[mode]["tokens"][place]


@PROMPTS
def test_denoiser_logits(name: str, number: int) -> None:
    """Every stored denoiser pass: masked first blocks, later blocks, and all steps of one case."""
    model = golden(name)
    prompt = model.prompts[number]
    checked = 0
    for case in prompt["cases"]:
        cache, slot = _cache(model)
        _read(model, cache, slot, prompt["tokens"])
        size = case["block_size"]
        for step in case["trace"]:
            while cache.length(slot) < len(prompt["tokens"]) + step["block"] * size:
                done = cache.length(slot) - len(prompt["tokens"])
                _read(model, cache, slot, case["output"][done : done + size])
            stored = case["logits"].get(f"{step['block']}.{step['step']}")
            if stored is not None:
                _close(_denoise(model, cache, slot, step["xt"], step["t"]), model.tensors[stored], DENOISER_LOGITS)
                checked += 1
    assert checked >= 7


@pytest.mark.parametrize("name", MODELS)
def test_time_conditioning(name: str) -> None:
    model = golden(name)
    t = model.tensors["time.t"]
    _close(sinusoid(t, torch.float32), model.tensors["time.sinusoid.f32"], 3e-4)
    _close(sinusoid(t, torch.bfloat16).float(), model.tensors["time.sinusoid.bf16"].float(), 8e-3)
    _close(model.denoiser.time(t).flatten(1), model.tensors["time.t_emb.f32"], 1e-5)


def test_there_are_goldens() -> None:
    assert MODELS, f"no golden vectors under {GOLDEN_DIR}"
