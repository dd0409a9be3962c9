"""Between host and device: small values onto it without making the host wait, marks in a stream, a thread's device."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def on_device(values: Sequence[object], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.tensor(values)` on `device`.

    A plain copy to a GPU waits until everything queued before it has run: pageable memory cannot be copied behind the
    host's back. Pinned memory can; torch keeps it until the copy has ended.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def bits_on_device(rows: Sequence[bytes], device: torch.device) -> Tensor:
    """Rows of equal length as 32-bit words [N,W], as `on_device` would have them."""
    words_NW = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int32).view(len(rows), -1)
    return words_NW.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words_NW


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the calling thread's current one: pinned memory, kernels that are not torch's, and streams that
    name no device belong to that. A new thread's is GPU 0, whichever the process uses."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def fence_on(device: torch.device) -> torch.cuda.Event | None:
    """After it, what is queued on the calling thread's stream by now has run; None on a CPU."""
    if device.type != "cuda":
        return None
    fence = torch.cuda.Event()
    fence.record(torch.cuda.current_stream(device))
    return fence
