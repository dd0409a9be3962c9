"""Our seam over the real packages against the plain torch functions, by the measure that loading uses."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.goldens import CPU, VENDORED
from tests.kernels import real
from twotower.config import ModelConfig
from twotower.model.checkpoint import Checkpoint
from twotower.model.kernels import flash_attention, fused_mamba, paged_attention, parity
from twotower.planner.released import RELEASED

pytestmark = [pytest.mark.kernels, pytest.mark.timeout(300)]

FP32_NOISE = 2e-5  # of the largest value; the interpreter multiplies in fp32, where a GPU uses TF32
LARGE = replace(RELEASED, hybrid_override_pattern="M*")
SMALL = {name: Checkpoint.open(VENDORED / name).config for name in ("tt_moe", "tt_dense")}
SHAPES = {**SMALL, "30B": LARGE}
# Less than a chunk, a chunk or a block, and several with a partial one at the end. In two rows, one of them without a
# state, and of the 30B's heads a quarter where there is much to interpret.
SCANS = [(name, config, length) for name, config in SMALL.items() for length in (2, 16, 40)]
SCANS += [("30B", LARGE, 16), ("a quarter of the 30B", replace(LARGE, mamba_num_heads=16, n_groups=2), 130)]


@pytest.fixture(autouse=True)
def two_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(parity, "_ROWS", 2)
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(("config", "length"), [scan[1:] for scan in SCANS], ids=[f"{n}-{t}" for n, _, t in SCANS])
def test_scan(config: ModelConfig, length: int) -> None:
    scan = fused_mamba.scan(real.load("mamba_ssm.ops.triton.ssd_combined"))
    for case, deviation in parity.scan_deviations(scan, config, CPU, [length]):
        assert deviation <= FP32_NOISE, case


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_step(config: ModelConfig) -> None:
    step = fused_mamba.step(real.load("mamba_ssm.ops.triton.selective_state_update"))
    for case, deviation in parity.step_deviations(step, config, CPU):
        assert deviation <= FP32_NOISE, case


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_convolution(config: ModelConfig) -> None:
    convolve = fused_mamba.convolution(real.load("causal_conv1d"))
    calls = real.CONVOLUTION.calls
    for case, deviation in parity.convolution_deviations(convolve, config, CPU):
        assert deviation <= parity.TOLERANCE, case
    assert real.CONVOLUTION.calls == calls + len(parity.LENGTHS) - 1  # one position stays with torch


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_attention(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def unused(*_: object) -> torch.Tensor:
        raise AssertionError("the masked path was taken")

    monkeypatch.setattr(parity, "_CACHED", (37,))
    monkeypatch.setattr(parity, "_ROWS", 3)
    attend = flash_attention.attention(flash_attention.flash_attn(real.load("flash_attn")), unused)
    calls = real.ATTENTION.stand_ins.calls
    for case, deviation in parity.attention_deviations(attend, config, CPU, torch.bfloat16):
        assert deviation <= parity.TOLERANCE, case
    assert real.ATTENTION.stand_ins.calls > calls


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_attention_in_pages(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_CACHED", (37,))
    monkeypatch.setattr(parity, "_ROWS", 3)
    assert paged_attention.flash_misfit(real.load("flash_attn")) is None
    attend = paged_attention.attention(paged_attention.flash_attn(real.load("flash_attn")))
    calls = real.ATTENTION.stand_ins.calls
    for case, deviation in parity.paged_deviations(attend, config, CPU, torch.bfloat16):
        assert deviation <= parity.TOLERANCE, case
    assert real.ATTENTION.stand_ins.calls > calls
