"""Small host values onto a device, without making the host wait for it."""

from collections.abc import Sequence

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
