"""Keeps a tower's experts evenly used without an auxiliary loss (DeepSeek-V3, §2.1.2).

After each train step the router's correction bias moves a little towards experts chosen less than their share.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.model.moe import Router
from twotower.model.tower import Tower


class ExpertBalance:
    """Counts, through hooks, how often each router chose each expert; `update` then moves the biases."""

    def __init__(self, tower: Tower, rate: float) -> None:
        self._rate = rate
        self._counts: dict[Router, Tensor] = {}
        routers = [module for module in tower.modules() if isinstance(module, Router)]
        self._hooks = [router.register_forward_hook(self._count) for router in routers]

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()

    def _count(self, router: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        assert isinstance(router, Router)
        chosen_E = torch.bincount(output[0].flatten(), minlength=router.weight.shape[0])
        self._counts[router] = chosen_E + self._counts.get(router, torch.zeros_like(chosen_E))

    def update(self) -> None:
        """Move each bias by `rate` up where the expert was used below the mean, down where above; forget counts."""
        for router, chosen_E in self._counts.items():
            load_E = chosen_E.float()
            router.e_score_correction_bias += self._rate * torch.sign(load_E.mean() - load_E)
        self._counts.clear()
