"""Between host and device: copies of small values without making the host wait, fences in a stream, a
thread's device.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def on_device(values: Sequence[object], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.tensor(values)` on `device`.

    A plain copy to a GPU waits until everything queued before it has run, because pageable memory cannot be copied
    asynchronously. Pinned memory can; torch keeps it until the copy has ended.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def bits_on_device(rows: Sequence[bytes], device: torch.device) -> Tensor:
    """Rows of equal length as 32-bit words [N,W] on the device, as by `on_device`."""
    words_NW = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int32).view(len(rows), -1)
    return words_NW.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words_NW


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the calling thread's current one. Pinned memory, kernels of other packages, and streams without a
    device belong to the current device. A new thread's current device is GPU 0, whichever the process uses.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def fence_on(device: torch.device) -> torch.cuda.Event | None:
    """An event after which all work queued so far on the calling thread's stream has run; None on a CPU."""
    if device.type != "cuda":
        return None
    fence = torch.cuda.Event()
    fence.record(torch.cuda.current_stream(device))
    return fence
