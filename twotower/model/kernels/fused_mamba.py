"""mamba-ssm's Triton scan and step, and causal-conv1d's convolution, behind our functions' signatures.

Imported only where those packages are. Seen so far: mamba-ssm's kernels under Triton's interpreter on a CPU;
causal-conv1d's Python over a stand-in for its compiled part; neither on a GPU.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from twotower.model import mamba
from twotower.model.mamba import Convolve, Scan, ScanInputs, Step

_SMALLEST_CHUNK = 16  # tl.dot multiplies no smaller tiles


def scan(module: Any) -> Scan:
    """`mamba.scan` over the module `mamba_ssm.ops.triton.ssd_combined`."""
    chunk_scan = module.mamba_chunk_scan_combined

    def scan(inputs: ScanInputs, ssm_RHPN: Tensor, chunk: int, with_end: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Of the states it returns only the first and the last. The kernel's products are TF32."""
        length = inputs.x.shape[1]
        chunk = scan_chunk(chunk, length)
        x, dt, b, c = (_padded(part, chunk) for part in (inputs.x, inputs.dt, inputs.b, inputs.c))
        y, end = chunk_scan(x, dt, inputs.a, b, c, chunk, initial_states=ssm_RHPN, return_final_states=True)
        return y[:, :length], [ssm_RHPN, end]

    return scan


def step(module: Any) -> Step:
    """`mamba.step` over the module `mamba_ssm.ops.triton.selective_state_update`."""
    state_update = module.selective_state_update

    def step(inputs: ScanInputs, ssm_RHPN: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel writes into the state it is given, which may be the cache itself: so a copy."""
        state = ssm_RHPN.clone()
        by_head = state.shape[1:3]
        dt_RHP = inputs.dt[:, 0, :, None].expand(-1, *by_head)
        a_HPN = inputs.a[:, None, None].expand(state.shape[1:])
        # Optional by its signature, but its launcher reads the strides of both. Stride 0 keeps it on its way for dt
        # and A that are one number a head.
        zero_HP = inputs.a.new_zeros(()).expand(by_head)
        now = (inputs.x[:, 0], dt_RHP, a_HPN, inputs.b[:, 0], inputs.c[:, 0])
        return state_update(state, *now, D=zero_HP, dt_bias=zero_HP)[:, None], state

    return step


def scan_chunk(wanted: int, length: int) -> int:
    """The chunk for `length` positions: a power of two, no longer than they are (nor than `wanted`), at least 16.

    A chunk longer than the block, together with an initial state, is the kernel's known trap (garbage on an A100 with
    mamba-ssm 2.3.2). Positions are padded to whole chunks, so that the kernel never meets a partial one either.
    """
    return max(1 << (min(wanted, length).bit_length() - 1), _SMALLEST_CHUNK)


def _padded(part: Tensor, chunk: int) -> Tensor:
    """Zeros after the last position [R,L,…]; where dt is 0 the state stays as it is."""
    missing = -part.shape[1] % chunk
    return F.pad(part, [0, 0] * (part.dim() - 2) + [0, missing]) if missing else part


def convolution(module: Any) -> Convolve:
    """`mamba.convolve` over the module `causal_conv1d`. One position stays with torch: the update writes in place."""
    causal_conv1d = module.causal_conv1d_fn

    def convolve(stream_RTC: Tensor, conv1d: nn.Conv1d) -> Tensor:
        taps = conv1d.kernel_size[0]
        if stream_RTC.shape[1] == taps + 1:
            return mamba.convolve(stream_RTC, conv1d)
        by_channel = stream_RTC.transpose(1, 2)  # [R,C,T], channels still innermost: the layout the kernel seeds from
        seed_RCk, new_RCL = by_channel[:, :, 1:taps], by_channel[:, :, taps:]
        weight_CK = conv1d.weight[:, 0]
        out_RCL = causal_conv1d(new_RCL, weight_CK, conv1d.bias, initial_states=seed_RCk, activation="silu")
        out: Tensor = out_RCL.transpose(1, 2).float()
        return out

    return convolve


def convolution_misfit(channels: int, taps: int) -> str | None:
    """Why the kernel cannot take these shapes; None where it can."""
    if not 2 <= taps <= 4:
        return f"causal_conv1d wants 2 to 4 taps, the model has {taps}"
    if channels % 8:
        return f"causal_conv1d wants a multiple of 8 channels, the model has {channels}"
    return None
