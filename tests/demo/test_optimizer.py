"""The steps that Muon takes, and that every weight of a tower gets one."""

import copy
from typing import Any

import pytest
import torch

from twotower.config import ModelConfig
from twotower.demo.initialise import new_context_tower, new_denoiser_tower
from twotower.demo.optimizer import Muon, TowerOptimizer, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (3, 40, 16), (3, 16, 40)])
def test_all_directions_of_a_step_are_about_equally_long(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spread = torch.linalg.svdvals(matrices)
    assert (spread.amax(-1) > 2 * spread.amin(-1)).all()
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.slow
def test_a_batch_of_matrices_moves_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    together = torch.nn.Parameter(torch.randn(3, 8, 4, generator=generator))
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in together.detach()]
    for _ in range(3):
        together.grad = torch.randn(3, 8, 4, generator=generator)
        for matrix, grad in zip(alone, together.grad, strict=True):
            matrix.grad = grad.clone()
        for optimizer in (Muon([together], 0.1), Muon(alone, 0.1)):
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.step()
    torch.testing.assert_close(together.detach(), torch.stack(list(alone)).detach())


def test_every_weight_is_moved(tiny_config: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    context = new_context_tower(ModelConfig.from_dict(tiny_config), generator)
    tower = new_denoiser_tower(context, generator)
    before = copy.deepcopy(tower.state_dict())
    optimizer = TowerOptimizer(tower, muon_rate=0.02, adam_rate=0.003, weight_decay=0.0)
    for parameter in tower.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step(1.0)
    assert not [name for name, parameter in tower.named_parameters() if torch.equal(parameter, before[name])]
    assert all(parameter.grad is None for parameter in tower.parameters())
