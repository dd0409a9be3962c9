"""Every implementation behind the seam against the plain torch path, by the measure that loading uses too.

The fused packages need a GPU. On a CPU their adapters run over stand-ins that keep the packages' contracts. One is a
trap: a chunk longer than the block, together with an initial state. `tests/kernels` runs the real packages.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.goldens import CPU, MODELS, golden
from tests.mamba_stand_ins import MambaStandIns
from twotower.config import ModelConfig
from twotower.model import mamba
from twotower.model.attention import Attend, attend
from twotower.model.cache import TowerCache
from twotower.model.kernels import choose, describe, fused_mamba, install, parity
from twotower.model.kernels.folded_attention import attend_folded
from twotower.model.kernels.fused_mamba import convolution_misfit, scan_chunk
from twotower.model.kernels.parity import TOLERANCE, attention_deviations
from twotower.model.mamba import MambaKernels
from twotower.model.tower import ContextTower

SMALL = ModelConfig(
    hybrid_override_pattern="M*",
    hidden_size=32,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    n_groups=2,
    ssm_state_size=16,
    chunk_size=64,
)
# The 30B's mixers, at which the fused kernels were tuned.
LARGE = replace(SMALL, num_attention_heads=32, head_dim=128, mamba_num_heads=64, mamba_head_dim=64, n_groups=8)
FULL = replace(LARGE, ssm_state_size=128, chunk_size=128)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _fused(load: Callable[[str], ModuleType]) -> MambaKernels:
    prefix = "mamba_ssm.ops.triton"
    return MambaKernels(
        fused_mamba.convolution(load("causal_conv1d")),
        fused_mamba.scan(load(f"{prefix}.ssd_combined")),
        fused_mamba.step(load(f"{prefix}.selective_state_update")),
    )


def _deviations(kernels: MambaKernels, config: ModelConfig, device: torch.device) -> Iterator[tuple[str, float]]:
    yield from parity.convolution_deviations(kernels.convolve, config, device)
    yield from parity.scan_deviations(kernels.scan, config, device)
    yield from parity.step_deviations(kernels.step, config, device)


def _real() -> MambaKernels:
    for package in ("mamba_ssm", "causal_conv1d"):
        if not torch.cuda.is_available() or find_spec(package) is None:
            pytest.skip(f"needs CUDA and {package}")
    return _fused(importlib.import_module)


def _cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return torch.device("cuda")


MAMBA: dict[str, Callable[[], tuple[MambaKernels, torch.device, ModelConfig]]] = {
    "torch": lambda: (mamba.PLAIN, CPU, SMALL),
    "stand-in": lambda: (_fused(MambaStandIns().load), CPU, SMALL),
    "mamba_ssm and causal_conv1d on CUDA": lambda: (_real(), _cuda(), FULL),
}
ATTENTION: dict[str, tuple[Attend, Callable[[], torch.device]]] = {
    "torch": (attend, lambda: CPU),
    "folded": (attend_folded, lambda: CPU),
    "folded on CUDA": (attend_folded, _cuda),
}


def _marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.gpu] if name.endswith("on CUDA") else []) for name in names]


@pytest.mark.parametrize("implementation", _marked(MAMBA))
def test_mamba(implementation: str) -> None:
    kernels, device, config = MAMBA[implementation]()
    for case, deviation in _deviations(kernels, config, device):
        assert deviation <= TOLERANCE, case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", _marked(ATTENTION))
def test_attention(implementation: str, dtype: torch.dtype) -> None:
    replacement, device = ATTENTION[implementation]
    for case, deviation in attention_deviations(replacement, SMALL, device(), dtype):
        assert deviation <= (1e-5 if dtype is torch.float32 else 2e-2), case


@pytest.mark.parametrize("wanted", [1, 16, 100, 128, 256])
@pytest.mark.parametrize("length", [2, 3, 15, 16, 17, 24, 127, 128, 130, 500, 512])
def test_no_chunk_is_longer_than_what_it_reads(wanted: int, length: int) -> None:
    chunk = scan_chunk(wanted, length)
    assert chunk & (chunk - 1) == 0
    assert 16 <= chunk <= max(wanted, 16)
    assert chunk <= max(length, 16)


def test_the_scan_is_given_whole_chunks_only() -> None:
    stand_in = MambaStandIns()
    for _ in _deviations(_fused(stand_in.load), SMALL, CPU):
        pass
    assert stand_in.chunks == [(16, 16), (16, 16), (16, 32), (64, 192)]
    assert all(length % chunk == 0 for chunk, length in stand_in.chunks)


def test_a_step_leaves_the_state_it_was_given_alone() -> None:
    deviations = dict(_deviations(_fused(MambaStandIns().load), SMALL, CPU))
    assert deviations["state before [3,1] left alone"] == 0


def test_convolution_shapes_the_package_cannot_take() -> None:
    assert convolution_misfit(6144, 4) is None
    assert convolution_misfit(6144, 5) == "causal_conv1d wants 2 to 4 taps, the model has 5"
    assert convolution_misfit(100, 4) == "causal_conv1d wants a multiple of 8 channels, the model has 100"


def test_an_installed_choice_computes_and_is_described(caplog: pytest.LogCaptureFixture) -> None:
    model = golden(MODELS[0])
    config = model.checkpoint.config
    stand_in = MambaStandIns()
    tower = ContextTower(config)
    tower.load_state_dict(model.context.state_dict())
    assert describe(tower) == "torch"
    kernels = replace(choose(config, CPU, torch.float32), mamba=replace(_fused(stand_in.load), convolve=mamba.convolve))
    with caplog.at_level("INFO"):
        install(tower, replace(kernels, attend=attend_folded))
    assert f"ContextTower kernels: {describe(tower)}" in caplog.text
    tokens = torch.tensor([max((prompt["tokens"] for prompt in model.prompts), key=len)[:24]])
    logits = []
    for each in (tower, model.context):
        cache = TowerCache(config, 1, 8, CPU, torch.float32)
        slot = cache.allocate(32)
        logits.append(each.logits(each(tokens, cache.extending([slot], [tokens.shape[1]], tokens.shape[1]))))
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert len(stand_in.chunks) == len(config.layers_of("M"))
