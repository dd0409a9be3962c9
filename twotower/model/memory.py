"""Memory for tensors that are seldom full."""

import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor


def untouched_zeros(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros. On a CPU a part of them takes memory only once it is written: `torch.zeros` writes them all."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, device=device, dtype=dtype)
    memory = numpy.zeros(math.prod(shape) * dtype.itemsize, numpy.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
