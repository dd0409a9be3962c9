"""The stand-ins for the kernel packages refuse what the real functions refuse; torch's own varlen attention for real.

`tests/kernels` asks the same of the other packages themselves.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.flash_stand_ins import FlashStandIns
from tests.goldens import CPU
from tests.mamba_stand_ins import MambaStandIns, signature_misfits
from tests.refusals import (
    Refusal,
    convolution_call,
    convolution_refusals,
    flash_call,
    flash_refusals,
    paged_call,
    paged_refusals,
    paged_varlen_call,
    paged_varlen_refusals,
    scan_call,
    scan_refusals,
    step_call,
    step_refusals,
    varlen_call,
    varlen_refusals,
)
from twotower.config import ModelConfig
from twotower.model.kernels import flash_attention, paged_attention, parity

CALLS: list[tuple[Callable[..., Any], Callable[[], dict[str, Any]], Callable[[], Iterator[Refusal]]]] = [
    (MambaStandIns().causal_conv1d_fn, convolution_call, convolution_refusals),
    (MambaStandIns().selective_state_update, step_call, step_refusals),
    (MambaStandIns().mamba_chunk_scan_combined, scan_call, scan_refusals),
    (FlashStandIns().flash_attn_with_kvcache, flash_call, flash_refusals),
    (FlashStandIns().flash_attn_with_kvcache, paged_call, paged_refusals),
    (FlashStandIns().varlen_attn, paged_varlen_call, paged_varlen_refusals),
    (FlashStandIns().varlen_attn, varlen_call, varlen_refusals),
]
REFUSED = [
    pytest.param(function, refusal, id=f"{function.__name__}: {refusal.name}")
    for function, _, refusals in CALLS
    for refusal in refusals()
]


@pytest.mark.parametrize(("function", "call"), [case[:2] for case in CALLS], ids=[case[0].__name__ for case in CALLS])
def test_what_ours_passes_is_taken(function: Callable[..., Any], call: Callable[[], dict[str, Any]]) -> None:
    function(**call())


@pytest.mark.parametrize(("function", "refusal"), REFUSED)
def test_what_the_real_one_refuses_is_refused(function: Callable[..., Any], refusal: Refusal) -> None:
    with pytest.raises(refusal.error):
        function(**refusal.given)


class TestTorchsOwn:
    """The installed torch's varlen attention: its Python and its operators, down to a stand-in for the CUDA kernel."""

    pytestmark = pytest.mark.slow  # torch brings two seconds of its compiler

    @pytest.fixture
    def stand_ins(self) -> Iterator[FlashStandIns]:
        stand_ins = FlashStandIns()
        library = torch.library.Library("aten", "IMPL")
        library.impl("_flash_attention_forward", stand_ins.flash_attention_forward, "CPU")
        yield stand_ins
        library._destroy()

    def test_it_is_called_as_it_wants(self, stand_ins: FlashStandIns) -> None:
        config = ModelConfig(
            hybrid_override_pattern="*", hidden_size=32, num_attention_heads=8, num_key_value_heads=2, head_dim=16
        )
        module = importlib.import_module("torch.nn.attention.varlen")
        assert flash_attention.varlen_misfit(module) is None
        attend = flash_attention.attention(flash_attention.varlen_attn(module), _unused)
        with torch.inference_mode():
            for case, deviation in parity.attention_deviations(attend, config, CPU, torch.bfloat16):
                assert deviation <= parity.TOLERANCE, case
        assert stand_ins.calls

    def test_it_is_called_as_it_wants_over_pages(self, stand_ins: FlashStandIns) -> None:
        config = ModelConfig(
            hybrid_override_pattern="*", hidden_size=32, num_attention_heads=8, num_key_value_heads=2, head_dim=16
        )
        module = importlib.import_module("torch.nn.attention.varlen")
        assert paged_attention.varlen_misfit(module) is None
        attend = paged_attention.attention(paged_attention.varlen_attn(module))
        with torch.inference_mode():
            for case, deviation in parity.paged_deviations(attend, config, CPU, torch.bfloat16):
                assert deviation <= parity.TOLERANCE, case
        assert stand_ins.calls

    @pytest.mark.parametrize(
        "refusal", [*varlen_refusals(), *paged_varlen_refusals()], ids=lambda refusal: refusal.name
    )
    def test_it_refuses_what_our_stand_in_refuses(self, refusal: Refusal, stand_ins: FlashStandIns) -> None:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        varlen_attn(**varlen_call())
        varlen_attn(**paged_varlen_call())
        with pytest.raises(refusal.error):
            varlen_attn(**refusal.given)

    def test_our_stand_in_takes_nothing_that_it_does_not(self) -> None:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        assert signature_misfits(FlashStandIns().varlen_attn, varlen_attn) == []


def test_a_stand_in_that_takes_too_much_is_seen() -> None:
    def real(x: int, *, y: int = 1) -> None: ...

    def ours(x: int, y: int = 2, z: int = 3) -> None: ...

    assert signature_misfits(real, real) == []
    assert signature_misfits(ours, real) == ["y: 2, not 1", "y: by place", "z"]


def _unused(*_: object) -> torch.Tensor:
    raise AssertionError("the masked path was taken")
