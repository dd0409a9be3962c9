"""Every implementation behind the seam against the plain torch path, by the measure that loading uses too.

The fused packages need a GPU. On a CPU their adapters run over stand-ins that keep the packages' contracts, above all
the one that is a trap: a chunk longer than the block, together with an initial state.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.goldens import CPU, MODELS, golden
from twotower.config import ModelConfig
from twotower.errors import ConfigError
from twotower.model import mamba
from twotower.model.attention import Attend, attend
from twotower.model.cache import TowerCache
from twotower.model.kernels import choice, choose, describe, install
from twotower.model.kernels.folded_attention import attend_folded
from twotower.model.kernels.fused_mamba import convolution, convolution_misfit, scan_and_step, scan_chunk
from twotower.model.kernels.parity import TOLERANCE, attention_deviations, mamba_deviations
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


class StandIn:
    """mamba-ssm and causal-conv1d as their documentation has them, slowly. Keeps the chunk sizes it was given."""

    def __init__(self) -> None:
        self.chunks: list[tuple[int, int]] = []

    def load(self, name: str) -> ModuleType:
        if not name.startswith(("mamba_ssm.", "causal_conv1d")):
            raise ModuleNotFoundError(f"No module named {name!r}")
        functions = (self.mamba_chunk_scan_combined, self.selective_state_update, self.causal_conv1d_fn)
        return SimpleNamespace(**{f.__name__: f for f in functions})  # type: ignore[return-value]

    def mamba_chunk_scan_combined(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        *,
        initial_states: Tensor,
        return_final_states: bool,
    ) -> tuple[Tensor, Tensor]:
        assert return_final_states
        assert x.dtype == dt.dtype == B.dtype == initial_states.dtype == torch.float32
        self.chunks.append((chunk_size, x.shape[1]))
        state, outputs = initial_states.clone(), []
        for t in range(x.shape[1]):
            dt_RHP, a_HPN = dt[:, t, :, None].expand(x[:, t].shape), A[:, None, None].expand(state.shape[1:])
            outputs.append(self.selective_state_update(state, x[:, t], dt_RHP, a_HPN, B[:, t], C[:, t]))
        return torch.stack(outputs, 1), state

    def selective_state_update(self, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """In place, as the real one."""
        assert dt.shape == x.shape == state.shape[:3]
        assert A.shape == state.shape[1:]
        group = state.shape[1] // B.shape[1]
        b, c = (part.repeat_interleave(group, 1)[:, :, None] for part in (B, C))
        state.mul_(torch.exp(dt[..., None] * A)).add_((dt * x)[..., None] * b)
        return (state * c).sum(-1)

    def causal_conv1d_fn(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, initial_states: Tensor, activation: str
    ) -> Tensor:
        assert activation == "silu"
        assert x.stride(1) == initial_states.stride(1) == 1, "states are taken in the channel-last layout only"
        assert x.stride(0) % 8 == x.stride(2) % 8 == 0
        assert initial_states.shape[2] == weight.shape[1] - 1
        joined = torch.cat([initial_states, x], 2).float()
        out = F.conv1d(joined, weight.float()[:, None], None if bias is None else bias.float(), groups=weight.shape[0])
        return F.silu(out).to(x.dtype)


def _fused(load: Callable[[str], ModuleType]) -> MambaKernels:
    prefix = "mamba_ssm.ops.triton"
    kernels = scan_and_step(load(f"{prefix}.ssd_combined"), load(f"{prefix}.selective_state_update"))
    return replace(kernels, convolve=convolution(load("causal_conv1d")))


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
    "stand-in": lambda: (_fused(StandIn().load), CPU, SMALL),
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
    for case, deviation in mamba_deviations(kernels, config, device):
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
    stand_in = StandIn()
    for _ in mamba_deviations(_fused(stand_in.load), SMALL, CPU):
        pass
    assert stand_in.chunks == [(16, 16), (16, 16), (16, 32), (64, 192)]
    assert all(length % chunk == 0 for chunk, length in stand_in.chunks)


def test_a_step_leaves_the_state_it_was_given_alone() -> None:
    deviations = dict(mamba_deviations(_fused(StandIn().load), SMALL, CPU))
    assert deviations["state before [3,1] left alone"] == 0


def test_convolution_shapes_the_package_cannot_take() -> None:
    assert convolution_misfit(6144, 4) is None
    assert convolution_misfit(6144, 5) == "it wants 2 to 4 taps, the model has 5"
    assert convolution_misfit(100, 4) == "it wants a multiple of 8 channels, the model has 100"


def test_on_a_cpu_everything_is_torch_and_says_why() -> None:
    kernels = choose(SMALL, CPU, torch.float32)
    assert (kernels.mamba, kernels.attend) == (mamba.PLAIN, attend)
    assert str(kernels).startswith("convolution: torch (no CUDA); scan and step: torch (no CUDA); attention: torch")


def test_torch_can_be_forced_and_nothing_else() -> None:
    assert "scan and step: torch (asked for)" in str(choose(SMALL, CPU, torch.float32, "torch"))
    with pytest.raises(ConfigError, match="kernels: got 'triton', wanted one of auto, torch"):
        choose(SMALL, CPU, torch.float32, "triton")


def _choose_as_on_cuda(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], ModuleType]) -> choice.Kernels:
    """The choice a GPU would meet, made on the CPU."""
    monkeypatch.setattr(choice._Candidates, "_allowed", lambda self, bfloat16_only: None)
    return choose(SMALL, CPU, torch.bfloat16, load=load)


def test_what_is_importable_and_agrees_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _choose_as_on_cuda(monkeypatch, StandIn().load)
    assert kernels.mamba.scan is not mamba.scan
    assert kernels.attend is attend_folded
    assert "scan and step: mamba_ssm (agrees with torch here)" in str(kernels)


def test_what_is_missing_or_broken_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(name: str) -> ModuleType:
        if name == "causal_conv1d":
            raise ImportError("undefined symbol")
        raise ModuleNotFoundError(f"No module named {name!r}")

    kernels = _choose_as_on_cuda(monkeypatch, load)
    assert kernels.mamba == mamba.PLAIN
    assert "convolution: torch (causal_conv1d is installed but broken: ImportError)" in str(kernels)
    assert "scan and step: torch (No module named 'mamba_ssm.ops.triton.ssd_combined')" in str(kernels)
    assert "causal_conv1d is installed but cannot be imported" in caplog.text


def test_what_differs_or_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(StandIn):
        def mamba_chunk_scan_combined(self, *args: object, **more: object) -> tuple[Tensor, Tensor]:
            y, end = super().mamba_chunk_scan_combined(*args, **more)  # type: ignore[arg-type]
            return y, torch.full_like(end, torch.nan)

        def causal_conv1d_fn(self, *args: object, **more: object) -> Tensor:
            raise RuntimeError("no kernel image is available")

    kernels = _choose_as_on_cuda(monkeypatch, Wrong().load)
    assert kernels.mamba == mamba.PLAIN
    assert "mamba_ssm differs from torch by inf in state after [3,2]" in str(kernels)
    assert "causal_conv1d failed: RuntimeError" in str(kernels)
    assert "mamba_ssm differs from torch by inf" in caplog.text


def test_an_installed_choice_computes_and_is_described(caplog: pytest.LogCaptureFixture) -> None:
    model = golden(MODELS[0])
    config = model.checkpoint.config
    stand_in = StandIn()
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
