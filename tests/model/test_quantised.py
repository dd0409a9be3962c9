"""Experts in 8 and 4 bits: what quantising loses, what a pass makes of it, and which files and settings are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.decode import SETTINGS, decode_all
from tests.goldens import CPU, causal_request, diffusion_request, vendored
from tests.model.checkpoints import config_of, tensors_of, write
from twotower.config import ModelConfig
from twotower.core import Mode, Request
from twotower.engine.settings import EngineSettings
from twotower.errors import CheckpointError, ConfigError
from twotower.expert_formats import ExpertFormat
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower, save_checkpoint
from twotower.model.moe import Experts
from twotower.model.quantised import Packed, QuantisedExperts, dequantised, plain_product, quantise

INT8, INT4 = ExpertFormat(8), ExpertFormat(4, 16)
FORMATS = pytest.mark.parametrize("form", [INT8, INT4, ExpertFormat(4, 32)], ids=str)


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("form", "most"), [(INT8, 0.008), (INT4, 0.09), (ExpertFormat(4, 64), 0.12)], ids=str)
def test_what_quantising_loses(form: ExpertFormat, most: float) -> None:
    weight = _random(24, 128)
    back = dequantised(quantise(weight, form))
    assert 0 < float((back - weight).norm() / weight.norm()) < most


@FORMATS
def test_levels_are_kept_exactly(form: ExpertFormat) -> None:
    """What a format can hold, it holds: every level of it, and zeros."""
    levels = torch.arange(-8, 8).repeat(4).float() if form.bits == 4 else torch.linspace(-127, 127, 64).round()
    weight = torch.stack([levels, levels * 0.25, torch.zeros(64)])
    torch.testing.assert_close(dequantised(quantise(weight, form)), weight, atol=0, rtol=0 if form.bits == 4 else 1e-6)


def test_a_group_with_an_outlier_spares_the_others() -> None:
    weight = _random(1, 64)
    weight[0, 3] = 100.0
    back = dequantised(quantise(weight, INT4))
    torch.testing.assert_close(back[0, 16:], dequantised(quantise(weight[:, 16:], INT4))[0], atol=0, rtol=0)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of("tt_moe")
    name = next(name for name in tensors if name.startswith("context_") and ".experts.1.up_proj" in name)
    tensors[name][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=rf"{name}.*not finite"):
        load_context_tower(Checkpoint.open(write(tmp_path, tensors, config_of("tt_moe")), INT8), CPU, torch.float32)


@FORMATS
def test_the_product_is_that_of_the_weights_it_stands_for(form: ExpertFormat) -> None:
    packed = Packed(
        *(torch.stack(p) for p in zip(*(quantise(_random(6, 32, seed=seed), form) for seed in range(3)), strict=True))
    )
    x, ends = _random(5, 32), torch.tensor([2, 2, 5], dtype=torch.int32)
    weights = dequantised(packed)
    wanted = torch.cat([x[:2] @ weights[0].T, x[2:] @ weights[2].T])
    torch.testing.assert_close(plain_product(x, packed, ends), wanted)


@FORMATS
def test_a_mixture_is_that_of_plain_experts_with_these_weights(form: ExpertFormat) -> None:
    config = replace(vendored("tt_moe").checkpoint.config, hidden_size=64, moe_intermediate_size=32, mlp_bias=True)
    plain, ours = Experts(config), QuantisedExperts(config.with_experts(form))
    with torch.no_grad():
        for part in ("up", "down"):
            made = [quantise(_random(*getattr(plain, f"{part}_proj").shape[1:], seed=s), form) for s in range(8)]
            packed = Packed(*(torch.stack(parts) for parts in zip(*made, strict=True)))
            getattr(ours, f"{part}_proj").copy_(packed.weights)
            getattr(ours, f"{part}_scale").copy_(packed.scales)
            getattr(plain, f"{part}_proj").copy_(dequantised(packed))
            for experts in (plain, ours):
                getattr(experts, f"{part}_bias").copy_(_random(*getattr(plain, f"{part}_bias").shape, seed=9))
        x, chosen = _random(40, 64), torch.stack([torch.randperm(8)[:2] for _ in range(40)])
        weights = _random(40, 2).abs()
        torch.testing.assert_close(ours(x, chosen, weights), plain(x, chosen, weights), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("form", [INT8, INT4], ids=str)
def test_ahead_and_at_load_give_the_same_towers(form: ExpertFormat, tmp_path: Path) -> None:
    at_load = Checkpoint.open(vendored("tt_moe").checkpoint.directory, form)
    towers = load_context_tower(at_load, CPU, torch.float32), load_denoiser_tower(at_load, CPU, torch.float32)
    save_checkpoint(tmp_path, at_load.config, *towers)
    ahead = Checkpoint.open(tmp_path)
    assert ahead.config == at_load.config and not ahead.quantises
    for tower in towers:
        load = load_context_tower if tower.causal else load_denoiser_tower
        again = load(ahead, CPU, torch.float32).state_dict()
        for name, tensor in tower.state_dict().items():
            assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype, name
    assert ahead.fingerprint != at_load.fingerprint != vendored("tt_moe").checkpoint.fingerprint
    assert Checkpoint.open(tmp_path, form) == ahead
    with pytest.raises(CheckpointError, match="experts are int"):
        Checkpoint.open(tmp_path, ExpertFormat(8) if form.bits == 4 else ExpertFormat(4, 16))


def test_what_is_not_of_experts_stays_as_it_is() -> None:
    plain = load_context_tower(vendored("tt_moe").checkpoint, CPU, torch.float32).state_dict()
    ours = load_context_tower(Checkpoint.open(vendored("tt_moe").checkpoint.directory, INT4), CPU, torch.float32)
    for name, tensor in plain.items():
        if ".mixer.experts." not in name:
            assert torch.equal(ours.state_dict()[name], tensor), name
    experts = sum(t.nbytes for name, t in ours.state_dict().items() if ".mixer.experts." in name)
    assert experts == sum(t.nbytes for name, t in plain.items() if ".mixer.experts." in name) / 32 * (4 + 16 / 16)


@pytest.mark.parametrize("form", [pytest.param(INT8, marks=pytest.mark.slow), INT4], ids=str)
@pytest.mark.slow
def test_tokens_do_not_depend_on_company_nor_on_recording(form: ExpertFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and eager, together and recorded: a recorded pass must look anew which experts are touched."""
    monkeypatch.setattr("twotower.engine.capture.OFTEN", 1)
    model = vendored("tt_moe")
    checkpoint = Checkpoint.open(model.checkpoint.directory, form)
    towers = load_context_tower(checkpoint, CPU, torch.float32), load_denoiser_tower(checkpoint, CPU, torch.float32)
    requests: list[Request] = []
    for prompt in model.prompts[:2]:
        requests += [causal_request(prompt, Mode.AR), diffusion_request(prompt, prompt["cases"][0])]
    requests = [replace(request, params=replace(request.params, max_new_tokens=16)) for request in requests]
    together = decode_all(*towers, requests, settings=replace(SETTINGS, capture="auto"))
    alone = decode_all(*towers, requests, together=False, settings=replace(SETTINGS, capture="off"))
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quant_method": "fp8"}, ["quant_method 'fp8'", "twotower_experts"]),
        ("int4", ["got a str", "JSON object"]),
        ({"quant_method": "twotower_experts"}, ["experts None"]),
        ({"quant_method": "twotower_experts", "experts": "int3", "group_size": 0}, ["int3", "int8", "int4"]),
        ({"quant_method": "twotower_experts", "experts": "int8", "group_size": 32}, ["expert_group: got 32"]),
        ({"quant_method": "twotower_experts", "experts": "int4", "group_size": 24}, ["groups of 24", "16, 32"]),
        ({"quant_method": "twotower_experts", "experts": "stored", "group_size": 0}, ["stored"]),
    ],
)
def test_configs_that_are_refused(values: Any, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(config_of("tt_moe") | {"quantization_config": values})
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    config = replace(vendored("tt_moe").checkpoint.config, hidden_size=128, moe_intermediate_size=48)
    with pytest.raises(CheckpointError, match=r"groups of 32 do not divide 48 \(moe_inter.*groups of 16, or int8"):
        config.with_experts(ExpertFormat(4, 32))
    with pytest.raises(CheckpointError, match="no layers with experts"):
        vendored("tt_dense").checkpoint.config.with_experts(INT8)


def _plain_config(values: dict[str, Any]) -> None:
    del values["quantization_config"]


def _other_bits(values: dict[str, Any]) -> None:
    values["quantization_config"] = ExpertFormat(4, 16).as_config()


@pytest.mark.parametrize("change", [_plain_config, _other_bits])
def test_files_that_are_not_what_their_config_says(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    """Also what a loader that knows nothing of quantised experts meets: other shapes and more names than it wants."""
    at_load = Checkpoint.open(vendored("tt_moe").checkpoint.directory, INT8)
    towers = load_context_tower(at_load, CPU, torch.float32), load_denoiser_tower(at_load, CPU, torch.float32)
    save_checkpoint(tmp_path, at_load.config, *towers)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["quantization_config"] == {"quant_method": "twotower_experts", "experts": "int8", "group_size": 0}
    assert values["model_type"] == "twotower_experts" and "experts" not in values
    change(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"unexpected tensor|got shape|got dtype"):
        load_context_tower(Checkpoint.open(tmp_path), CPU, torch.float32)


def test_a_released_module_takes_no_quantised_matrix() -> None:
    """torch's own loading refuses the shape, whatever it is told of missing and unexpected names."""
    linear = torch.nn.Linear(64, 32, bias=False)
    for form in (INT8, INT4):
        with pytest.raises(RuntimeError, match="size mismatch"):
            linear.load_state_dict({"weight": quantise(_random(32, 64), form).weights}, strict=False)


def test_transformers_does_not_know_the_model_type(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    at_load = Checkpoint.open(vendored("tt_moe").checkpoint.directory, INT8)
    towers = load_context_tower(at_load, CPU, torch.float32), load_denoiser_tower(at_load, CPU, torch.float32)
    save_checkpoint(tmp_path, at_load.config, *towers)
    with pytest.raises(ValueError, match="twotower_experts"):
        transformers.AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"experts": "int2"}, "experts: got 'int2', wanted one of stored, int8, int4"),
        ({"experts": "int8", "expert_group": 32}, "expert_group: got 32 with experts int8"),
        ({"experts": "int4", "expert_group": 24}, "in groups of 24"),
        ({"expert_group": 16}, "expert_group: got 16 with experts stored"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineSettings(**settings)
    assert EngineSettings(experts="int4").expert_format == ExpertFormat(4, 32)
