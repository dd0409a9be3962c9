"""Products with quantised experts in Triton: weights are read as they are held, and unpacked in registers.

Imported only where Triton is. One program makes a strip of one expert's outputs for all its rows, 32 at a time. It ends
at once if no row goes to that expert. So the host need not wait, and a CUDA graph can capture the kernel. A row's sums
are added in the same order, whatever the batch. Seen so far: under Triton's interpreter on a CPU, and compiled for GPUs
of compute capability 8.0, 9.0 and 10.0; never on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.model.quantised import Packed

ROWS = 32
_OUTPUTS, _BYTES = 64, 64


@triton.jit  # type: ignore[untyped-decorator]
def _int8(  # type: ignore[no-untyped-def]  # Triton reads annotations, and takes its own alone
    x, weights, scales, ends, out,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One weight a byte. Each output channel has a scale, by which its sums are multiplied."""
    expert = tl.program_id(0)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    channels = expert.to(tl.int64) * N + n
    scale = tl.load(scales + channels, mask=n < N, other=0.0)
    for first in range(start, end, ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
        for byte in range(0, K, BYTES):
            k = byte + tl.arange(0, BYTES)
            given = tl.load(
                x + rows[:, None] * K + k[None, :], mask=(rows[:, None] < end) & (k[None, :] < K), other=0.0
            )
            there = (k[:, None] < K) & (n[None, :] < N)
            held = tl.load(weights + channels[None, :] * K + k[:, None], mask=there, other=0)
            sums += tl.dot(given, held.to(tl.float32).to(given.dtype), input_precision="ieee")
        made = (sums * scale[None, :]).to(out.dtype.element_ty)
        tl.store(out + rows[:, None] * N + n[None, :], made, mask=(rows[:, None] < end) & (n[None, :] < N))


@triton.jit  # type: ignore[untyped-decorator]
def _int4(  # type: ignore[no-untyped-def]  # as above
    x, weights, scales, ends, out,
    N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Two weights a byte, HALF bytes a group. Byte b of a group has weight b in its low half, weight b + HALF in its
    high half.
    """
    expert = tl.program_id(0)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    channels = expert.to(tl.int64) * N + n
    for first in range(start, end, ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
        for byte in range(0, K // 2, BYTES):
            place = byte + tl.arange(0, BYTES)
            group = place // HALF
            k = group * (2 * HALF) + place % HALF
            ours = (rows[:, None] < end) & (place[None, :] < K // 2)
            low = tl.load(x + rows[:, None] * K + k[None, :], mask=ours, other=0.0)
            high = tl.load(x + rows[:, None] * K + k[None, :] + HALF, mask=ours, other=0.0)
            there = (place[:, None] < K // 2) & (n[None, :] < N)
            held = tl.load(weights + channels[None, :] * (K // 2) + place[:, None], mask=there, other=0).to(tl.int32)
            at = channels[None, :] * (K // (2 * HALF)) + group[:, None]
            scale = tl.load(scales + at, mask=there, other=0.0).to(tl.float32)
            lower = (((held & 15) - 8).to(tl.float32) * scale).to(low.dtype)
            upper = (((held >> 4) - 8).to(tl.float32) * scale).to(low.dtype)
            sums += tl.dot(low, lower, input_precision="ieee") + tl.dot(high, upper, input_precision="ieee")
        made = sums.to(out.dtype.element_ty)
        tl.store(out + rows[:, None] * N + n[None, :], made, mask=(rows[:, None] < end) & (n[None, :] < N))


def product(x_TK: Tensor, packed: Packed, ends_E: Tensor) -> Tensor:
    """`quantised.plain_product`."""
    experts, outputs, _, half = packed.weights.shape
    x_TK = x_TK.contiguous()
    out_TN = x_TK.new_empty(x_TK.shape[0], outputs)
    grid = (experts, triton.cdiv(outputs, _OUTPUTS))
    tiles = {"ROWS": ROWS, "OUTPUTS": _OUTPUTS, "BYTES": _BYTES}
    given = (x_TK, *packed, ends_E, out_TN)
    if packed.weights.dtype is torch.int8:
        _int8[grid](*given, N=outputs, K=x_TK.shape[1], **tiles)
    else:
        _int4[grid](*given, N=outputs, K=x_TK.shape[1], HALF=half, **tiles)
    return out_TN
