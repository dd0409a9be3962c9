"""The real packages take what ours passes, and refuse what the stand-ins of the ordinary tests refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.flash_stand_ins import FlashStandIns
from tests.kernels import real
from tests.mamba_stand_ins import MambaStandIns, signature_misfits
from tests.refusals import (
    Refusal,
    convolution_call,
    convolution_refusals,
    flash_call,
    flash_refusals,
    paged_call,
    paged_refusals,
    scan_call,
    scan_refusals,
    step_call,
    step_refusals,
)

pytestmark = pytest.mark.kernels

PREFIX = "mamba_ssm.ops.triton"
# Each function by its module, with its stand-in, what ours passes and what it refuses.
CALLS: dict[str, tuple[str, Callable[..., Any], dict[str, Any], list[Refusal]]] = {
    "causal_conv1d_fn": (
        "causal_conv1d",
        MambaStandIns().causal_conv1d_fn,
        convolution_call(),
        list(convolution_refusals()),
    ),
    "selective_state_update": (
        f"{PREFIX}.selective_state_update",
        MambaStandIns().selective_state_update,
        step_call(),
        list(step_refusals()),
    ),
    "mamba_chunk_scan_combined": (
        f"{PREFIX}.ssd_combined",
        MambaStandIns().mamba_chunk_scan_combined,
        scan_call(),
        list(scan_refusals()),
    ),
    "flash_attn_with_kvcache": (
        "flash_attn",
        FlashStandIns().flash_attn_with_kvcache,
        flash_call(),
        [*flash_refusals(), *paged_refusals()],
    ),
}
REFUSED = [
    pytest.param(function, refusal, id=f"{function}: {refusal.name}")
    for function, (*_, refusals) in CALLS.items()
    for refusal in refusals
]


def _real(function: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(real.load(CALLS[function][0]), function)
    return found


@pytest.mark.parametrize("function", CALLS)
def test_what_ours_passes_is_taken(function: str) -> None:
    with torch.inference_mode():
        _real(function)(**CALLS[function][2])


def test_pages_are_taken() -> None:
    with torch.inference_mode():
        out, sums = _real("flash_attn_with_kvcache")(**paged_call())
    assert out.shape == (3, 5, 4, 16) and sums.shape == (3, 4, 5)


@pytest.mark.parametrize(("function", "refusal"), REFUSED)
def test_it_refuses_what_its_stand_in_refuses(function: str, refusal: Refusal) -> None:
    with torch.inference_mode(), pytest.raises(refusal.error):
        _real(function)(**refusal.given)


@pytest.mark.parametrize("function", CALLS)
def test_its_stand_in_takes_nothing_that_it_does_not(function: str) -> None:
    assert signature_misfits(CALLS[function][1], _real(function)) == []
