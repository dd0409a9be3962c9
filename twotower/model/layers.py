"""The small parts: RMS norm, activations, the dense MLP."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.errors import CheckpointError


class RmsNorm(nn.Module):
    """`w ⊙ x / sqrt(mean(x²) + eps)`, in fp32 including the product with w, as in the released code."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.weight.dtype
        return F.rms_norm(x.to(dtype).float(), self.weight.shape, self.weight.float(), self.eps).to(dtype)


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": relu2,
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation a config names. Raises CheckpointError for one we do not know."""
    try:
        return _ACTIVATIONS[name]
    except KeyError:
        raise CheckpointError(f"mlp_hidden_act: got {name!r}, wanted one of {sorted(_ACTIVATIONS)}") from None


class Mlp(nn.Module):
    """`down(act(up(x)))`: the `-` layer, and a mixture's shared expert. Not gated."""

    def __init__(self, width: int, inner: int, bias: bool, act: str) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act(self.up_proj(x)))
        return out
