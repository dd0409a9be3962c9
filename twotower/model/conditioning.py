"""adaLN-single: how the denoiser is told the mask fraction t of its block."""

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 128


def sinusoid(t_R: Tensor, dtype: torch.dtype) -> Tensor:
    """[cos | sin] features [R,256] of 1000·t.

    The product is rounded to the model's dtype before the angle is taken, because the model was trained so; for
    bf16 that moves t = 3/16 from 187.5 to 188.
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
        dtype = self.t_block[1].weight.dtype
        out: Tensor = self.t_block(self.t_embedder(sinusoid(t_R, dtype)))
        return out.unflatten(-1, (3, -1))


def modulate(x_RLD: Tensor, modulation_R3D: Tensor) -> Tensor:
    """`x ⊙ (1 + scale) + shift`."""
    shift, scale = modulation_R3D[:, 0, None], modulation_R3D[:, 1, None]
    return x_RLD * (1 + scale) + shift


def gated(x_RLD: Tensor, modulation_R3D: Tensor) -> Tensor:
    return x_RLD * modulation_R3D[:, 2, None]


