"""Fresh weights: the context tower from random numbers, the denoiser as a copy of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from twotower.config import ModelConfig
from twotower.model.mamba import MambaMixer
from twotower.model.tower import ContextTower, DenoiserTower

_WRITES_STREAM = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts.down_proj")


def new_context_tower(config: ModelConfig, generator: torch.Generator) -> ContextTower:
    """A context tower with weights drawn by their fan-in; those that write the residual stream start smaller."""
    tower = ContextTower(config)
    depth_scale = config.num_layers**-0.5
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if weight.dim() >= 2:
                _draw(name, weight, depth_scale, generator)
        for module in tower.modules():
            if isinstance(module, MambaMixer):
                _draw_mamba(module, generator)
    return tower


def new_denoiser_tower(context: ContextTower, generator: torch.Generator) -> DenoiserTower:
    """A copy of the context tower whose time conditioning starts as the identity (shift 0, scale 0, gate 1)."""
    tower = DenoiserTower(context.config)
    tower.load_state_dict(context.state_dict(), strict=False)
    with torch.no_grad():
        for weight in tower.time.parameters():
            weight.zero_() if weight.dim() < 2 else weight.normal_(0, 0.02, generator=generator)
        last = tower.time.t_block[-1]
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        tower.scale_shift_tables.zero_()
        tower.scale_shift_tables[:, 2] = 1.0
    return tower


def _draw(name: str, weight: Tensor, depth_scale: float, generator: torch.Generator) -> None:
    if name == "embeddings.weight":
        std = 0.3
    elif name == "head.weight":
        std = 0.02
    elif "conv1d" in name:
        std = weight.shape[-1] ** -0.5
    else:
        std = weight.shape[-1] ** -0.5 * (depth_scale if name.endswith(_WRITES_STREAM) else 1.0)
    weight.normal_(0, std, generator=generator)


def _draw_mamba(mixer: MambaMixer, generator: torch.Generator) -> None:
    """Mamba-2's own start: dt log-uniform in 1e-3..1e-1, A uniform in 1..16, D one."""
    uniform_H = torch.rand(mixer.dt_bias.shape, generator=generator)
    dt_H = torch.exp(math.log(1e-3) + uniform_H * (math.log(1e-1) - math.log(1e-3)))
    mixer.dt_bias.copy_(dt_H + torch.log(-torch.expm1(-dt_H)))
    mixer.A_log.copy_(torch.log(1 + 15 * torch.rand(mixer.A_log.shape, generator=generator)))
    mixer.D.fill_(1.0)
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias.zero_()
