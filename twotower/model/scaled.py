"""Mamba states in 8 bits for the wire: a number for each number, and an fp32 scale for each channel of a head.

Shape suffixes: X leading dimensions (layers, sequences), H heads, P channels of a head, N numbers of a channel's state.
"""

import math
from typing import Any

import torch
from torch import Tensor

TOPS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The formats, and each one's largest number."""
_LEAST_SCALE = torch.finfo(torch.float32).tiny


class Scaled:
    """Views of 8-bit numbers [X,H,P,N], and of their scales [X,H,P].

    A channel's scale is its largest absolute number ÷ the format's. So nothing overflows. A channel with a NaN or an
    infinity comes back without a finite number. A scale depends on its own channel only, so no sequence changes what
    another one's states become.
    """

    def __init__(self, numbers_XHPN: Tensor, scales_XHP: Tensor) -> None:
        self.numbers, self.scales = numbers_XHPN, scales_XHP

    def hold(self, states_XHPN: Tensor) -> None:
        """Round fp32 states into the views. The states are overwritten. The host does not wait for anything."""
        torch.linalg.vector_norm(states_XHPN, math.inf, dim=-1, out=self.scales)
        self.scales.mul_(1 / TOPS[self.numbers.dtype]).clamp_(min=_LEAST_SCALE)  # a channel of zeros stays one
        states_XHPN.div_(self.scales.unsqueeze(-1))
        if not self.numbers.dtype.is_floating_point:
            states_XHPN.round_()
        self.numbers.copy_(states_XHPN)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The states, as a new tensor."""
        scales = self.scales.unsqueeze(-1)
        if self.numbers.dtype.is_floating_point:  # torch multiplies no 8-bit floats
            return self.numbers.to(dtype).mul_(scales)
        return torch.mul(self.numbers, scales).to(dtype)

    def __getitem__(self, places: Any) -> "Scaled":
        """A part, by places in the leading dimensions."""
        return Scaled(self.numbers[places], self.scales[places])
