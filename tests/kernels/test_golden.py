"""The real packages are chosen, and golden checkpoints decode NVIDIA's tokens through them in all three modes."""

from dataclasses import replace

import pytest
import torch

from tests.engine.decode import SETTINGS, decode_all
from tests.flash_stand_ins import AnyTower
from tests.goldens import CPU, causal_request, diffusion_request, vendored
from tests.kernels import real
from twotower.config import ModelConfig
from twotower.core import Mode
from twotower.model.kernels import Kernels, choice, choose, install, parity

pytestmark = [pytest.mark.kernels, pytest.mark.timeout(300)]

TINY = ModelConfig(
    hybrid_override_pattern="M*",
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=2,
    mamba_head_dim=16,
    n_groups=1,
    ssm_state_size=16,
    chunk_size=128,
)


FEW = 12  # of the 32 tokens in causal modes: the interpreter is slow


@pytest.fixture(scope="module")
def chosen() -> Kernels:
    """As on a GPU with all packages: what is chosen there for a small model. It computes others as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice._Candidates, "_allowed", lambda self, bfloat16_only: None)
        patch.setattr(parity, "_CACHED", (37,))
        return choose(TINY, CPU, torch.bfloat16, load=real.load)


def test_all_are_chosen(chosen: Kernels) -> None:
    for how in ("convolution: causal_conv1d", "scan: mamba_ssm", "step: mamba_ssm", "attention: flash_attn"):
        assert f"{how} (agrees with torch here)" in str(chosen)


@pytest.mark.parametrize(("name", "number"), [("tt_moe", 1), ("tt_dense", 2)])
def test_exact_tokens_in_all_modes(name: str, number: int, chosen: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real.ATTENTION.stand_ins, "any_dtype", True)  # the tokens are NVIDIA's in fp32
    model = vendored(name)
    context, denoiser = _through(chosen, model.context), _through(chosen, model.denoiser)
    prompt = model.prompts[number]
    case = next(case for case in prompt["cases"] if case["id"].endswith("b16_s16_g0.5"))
    requests = [diffusion_request(prompt, case)]
    for request in (causal_request(prompt, mode) for mode in (Mode.AR, Mode.MOCK_AR)):
        requests.append(replace(request, params=replace(request.params, max_new_tokens=FEW)))
    calls = (real.CONVOLUTION.calls, real.ATTENTION.stand_ins.calls)
    results = decode_all(context, denoiser, requests, settings=replace(SETTINGS, capture="off"))
    wanted = [case["output"], prompt["ar"]["tokens"][:FEW], prompt["mock_ar"]["tokens"][:FEW]]
    assert [result.token_ids for result in results] == wanted
    assert results[0].num_steps == case["nfe"]
    assert real.CONVOLUTION.calls > calls[0] and real.ATTENTION.stand_ins.calls > calls[1]


def _through(kernels: Kernels, tower: AnyTower) -> AnyTower:
    """The same tower, computing with these."""
    ours = type(tower)(tower.config).to(tower.device, tower.dtype).requires_grad_(False).eval()
    ours.load_state_dict(tower.state_dict())
    install(ours, kernels)
    return ours
