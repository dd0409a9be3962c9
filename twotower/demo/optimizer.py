"""How the demo's towers are trained: Muon for the hidden matrices, Adam for everything else.

Muon (K. Jordan et al., 2024): momentum, then the nearest semi-orthogonal matrix as the step, so that all directions of
a matrix move alike. `torch.optim.Muon` takes matrices one by one and in bf16; the routed experts are 96 small ones,
which here go through batched products in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from twotower.model.tower import Tower

# Of the quintic that drives singular values towards 1 (Jordan, "Muon", 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_MOMENTUM = 0.95
# Read or written one row at a time, or too small to have directions.
_NOT_HIDDEN = ("embeddings.", "head.", ".gate.", ".conv1d.", "time.", "scale_shift_tables")


class TowerOptimizer:
    """One tower's two optimizers as one. `rate` scales both of their learning rates."""

    def __init__(self, tower: Tower, muon_rate: float, adam_rate: float, weight_decay: float) -> None:
        hidden = [p for n, p in tower.named_parameters() if _is_hidden(n, p)]
        others = [p for n, p in tower.named_parameters() if not _is_hidden(n, p)]
        self._rates = muon_rate, adam_rate
        self._both: tuple[torch.optim.Optimizer, torch.optim.Optimizer] = (
            Muon(hidden, weight_decay),
            torch.optim.Adam(others, lr=0.0, betas=(0.9, 0.95), fused=True),
        )

    def step(self, rate: float) -> None:
        """Apply the gradients at this share of the learning rates, and forget them."""
        for optimizer, full_rate in zip(self._both, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = full_rate * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        """What a resumed run needs."""
        return [optimizer.state_dict() for optimizer in self._both]

    def load(self, state: Iterable[dict[str, Any]]) -> None:
        """Go on from `state()`."""
        for optimizer, part in zip(self._both, state, strict=True):
            optimizer.load_state_dict(part)


class Muon(torch.optim.Optimizer):
    """For matrices [.., rows, columns]; leading axes are a batch of them."""

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients at hand."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                self._update(weight, group["lr"], group["weight_decay"])

    def _update(self, weight: nn.Parameter, rate: float, weight_decay: float) -> None:
        assert weight.grad is not None
        momentum: Tensor = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        momentum.lerp_(weight.grad, 1 - _MOMENTUM)
        direction = orthogonal(weight.grad.lerp(momentum, _MOMENTUM))
        rows, columns = weight.shape[-2:]
        weight.mul_(1 - rate * weight_decay).sub_(direction, alpha=rate * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest semi-orthogonal matrix to each: singular values end between 0.7 and 1.2."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x  # type: ignore[no-any-return]


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    return len(parameter.shape) >= 2 and not any(part in name for part in _NOT_HIDDEN)
