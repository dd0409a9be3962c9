"""The Triton kernel for quantised experts under Triton's interpreter, against the plain product."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.goldens import CPU, vendored
from tests.kernels import real
from twotower.config import ModelConfig
from twotower.expert_formats import ExpertFormat
from twotower.model.kernels import choice, parity
from twotower.model.quantised import Packed, quantise
from twotower.planner.released import RELEASED

pytestmark = [pytest.mark.kernels, pytest.mark.timeout(300)]

FP32_NOISE = 2e-5  # of the largest value
FORMATS = [ExpertFormat(8), ExpertFormat(4, 16), ExpertFormat(4, 32), ExpertFormat(4, 64)]
SMALL = replace(RELEASED, hidden_size=192, moe_intermediate_size=64)  # a tile and a half of bytes
# The released widths, one beside a small other one: the interpreter is slow.
WIDE = [replace(RELEASED, moe_intermediate_size=64), replace(RELEASED, hidden_size=64)]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def bfloat16_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bf16 as 16 bits of an integer, and multiplies those. A GPU multiplies the numbers."""
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        for operand in (a, b):
            if operand.data.dtype == np.uint16:
                operand.data = (operand.data.astype(np.uint32) << 16).view(np.float32)
        return dot(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", create_dot)


def _product(x: torch.Tensor, packed: Packed, ends: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = real.load("twotower.model.kernels.quantised_product").product(x, packed, ends)
    return out


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_plain_product(form: ExpertFormat) -> None:
    for case, deviation in parity.product_deviations(_product, SMALL.with_experts(form), CPU, torch.float32):
        assert deviation < FP32_NOISE, case


@pytest.mark.parametrize("form", FORMATS[::2], ids=str)
def test_the_plain_product_in_bfloat16(form: ExpertFormat, bfloat16_dots: None) -> None:
    for case, deviation in parity.product_deviations(_product, SMALL.with_experts(form), CPU, torch.bfloat16):
        assert 0 < deviation < parity.TOLERANCE, case


@pytest.mark.parametrize("config", WIDE, ids=["hidden", "inner"])
@pytest.mark.parametrize("form", FORMATS[::2], ids=str)
def test_the_released_widths(form: ExpertFormat, config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_ROWS_OF_EXPERTS", (0, 3))
    for case, deviation in parity.product_deviations(_product, config.with_experts(form), CPU, torch.float32):
        assert deviation < FP32_NOISE, case


@pytest.mark.parametrize("form", FORMATS[:2], ids=str)
def test_a_row_has_the_same_bits_in_any_company(form: ExpertFormat) -> None:
    random = torch.Generator().manual_seed(5)
    matrices = [quantise(torch.randn(96, 64, generator=random), form) for _ in range(3)]
    packed = Packed(*(torch.stack(parts) for parts in zip(*matrices, strict=True)))
    x = torch.randn(70, 64, generator=random)
    together = _product(x, packed, torch.tensor([2, 2, 70], dtype=torch.int32))
    for row, expert in ((0, 0), (1, 0), (2, 2), (33, 2), (40, 2), (69, 2)):
        ends = torch.tensor([expert == 0, expert <= 1, True], dtype=torch.int32)
        assert torch.equal(_product(x[row : row + 1], packed, ends)[0], together[row]), row


def test_the_kernel_is_chosen(monkeypatch: pytest.MonkeyPatch, bfloat16_dots: None) -> None:
    config = vendored("tt_moe").checkpoint.config.with_experts(ExpertFormat(8))
    candidates = choice._Candidates(config, CPU, torch.bfloat16, "auto", real.load)
    monkeypatch.setattr(choice._Candidates, "_allowed", lambda self, bfloat16_only: None)
    product, how = choice._choose_product(candidates)
    assert str(how) == "experts: triton (agrees with torch here)"
    assert product is real.load("twotower.model.kernels.quantised_product").product


# Triton compiles for a GPU that is not there, but not in a process that interprets.
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from twotower.model.kernels import quantised_product as ours

tiles = {"N": 2688, "K": 1856, "ROWS": ours.ROWS, "OUTPUTS": ours._OUTPUTS, "BYTES": ours._BYTES}
kernels = {ours._int8: ("*i8", "*fp32", tiles), ours._int4: ("*u8", "*bf16", tiles | {"HALF": 16})}
for kernel, (weights, scales, fixed) in kernels.items():
    types = {"x": "*bf16", "weights": weights, "scales": scales, "ends": "*i32", "out": "*bf16"}
    source = ASTSource(kernel, types | dict.fromkeys(fixed, "constexpr"), fixed)
    for capability in (80, 90, 100):
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"] and "mma.sync" in made.asm["ptx"] and ".bf16" in made.asm["ptx"]
        print(kernel.__name__, capability)
"""


def test_it_compiles_for_gpus_at_the_released_widths() -> None:
    """With Triton's own assembler: what the interpreter lets pass, such as an annotation, a compiler may not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    wanted = [f"{kernel} {capability}" for kernel in ("_int8", "_int4") for capability in (80, 90, 100)]
    assert done.stdout.splitlines() == wanted, done.stderr
