"""adaLN-single: how the mask fraction t of its block conditions the denoiser."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

FREQUENCIES = 128


def sinusoid(t_R: Tensor, dtype: torch.dtype) -> Tensor:
    """[cos | sin] features [R,256] of 1000·t.

    The product is rounded to the model's dtype before the angle is taken, as in training. In bf16 this moves t = 3/16
    from 187.5 to 188.
    """
    scaled_R = (t_R.to(dtype) * 1000).float()
    exponents = torch.arange(FREQUENCIES, dtype=torch.float32, device=t_R.device) / FREQUENCIES
    angles = scaled_R[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


class TimestepEmbedder(nn.Module):
    """`W₂·silu(W₀·e + b₀) + b₂`; parameter names follow the files (`mlp.0`, `mlp.2`)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.mlp(features)
        return out


class TimeConditioning(nn.Module):
    """Shift, scale and gate [R,3,D] from t; one projection shared by all layers, to which each adds its own table."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.t_embedder = TimestepEmbedder(hidden)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 3 * hidden))

    def forward(self, t_R: Tensor) -> Tensor:
        dtype = next(self.t_block.parameters()).dtype
        out: Tensor = self.t_block(self.t_embedder(sinusoid(t_R, dtype)))
        return out.unflatten(-1, (3, -1))


class Modulation(NamedTuple):
    """The modulation of one layer, [R,1,D] each: `shift` and `scale` (1 already added) of its input, `gate` of its
    output.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __call__(self, x_RLD: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x_RLD, self.scale)


def modulations(shared_R3D: Tensor, tables_N3D: Tensor) -> list[Modulation]:
    """One for each of N layers, from what all share and each layer's own table."""
    all_NR3D = shared_R3D + tables_N3D[:, None]
    shift, scale, gate = all_NR3D[:, :, None].unbind(3)
    return [Modulation(*parts) for parts in zip(shift, 1 + scale, gate, strict=True)]
