"""Towers of any size with random weights made on the device, and caches that look as if they had been read into."""

import math
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.gpu_parts.site import Site
from twotower.model.cache import TowerCache
from twotower.model.kernels import choose, install
from twotower.model.loading import materialise
from twotower.model.pages import page_tokens_on, pages_for
from twotower.model.tower import ContextTower, DenoiserTower

AnyTower = TypeVar("AnyTower", ContextTower, DenoiserTower)


def random_tower(kind: type[AnyTower], site: Site, dtype: torch.dtype, kernels: str = "auto") -> AnyTower:
    """No host memory, no fp32 copy: 31.6 B parameters of bf16 are 59 GiB on the device and nothing elsewhere."""
    with torch.device("meta"):
        tower = kind(site.config)
    materialise(tower, site.device, dtype)
    random = torch.Generator(site.device).manual_seed(1)
    with torch.no_grad():
        for name, tensor in tower.state_dict().items():
            _fill(name, tensor, site.config.num_layers, random)
    tower.requires_grad_(False).eval()
    install(tower, choose(site.config, site.device, dtype, kernels))
    return tower


def _fill(name: str, tensor: Tensor, layers: int, random: torch.Generator) -> None:
    """Tame: what enters the residual stream is scaled down by the number of layers, scans decay, gates stay near 1."""
    leaf = name.rpartition(".")[2]
    if leaf == "A_log":
        tensor.uniform_(0, math.log(16), generator=random)
    elif leaf == "dt_bias":
        tensor.uniform_(-4, -2, generator=random)  # softplus of it: steps of 0.02 to 0.13
    elif leaf == "D" or name.endswith("norm.weight") or name == "norm_f.weight":
        tensor.fill_(1)
    elif leaf in ("bias", "e_score_correction_bias", "scale_shift_tables"):
        tensor.zero_()
    elif name.endswith(("out_proj.weight", "o_proj.weight", "down_proj", "down_proj.weight")):
        tensor.normal_(0, 0.02 / math.sqrt(2 * layers), generator=random)
    else:
        tensor.normal_(0, 0.02, generator=random)


def filled_cache(site: Site, dtype: torch.dtype, rows: int, room: int) -> tuple[TowerCache, list[int], int]:
    """A cache in which `rows` sequences have `site.cached` tokens and room for more; their slots; a scratch slot."""
    tokens = site.cached + room
    pages = rows * pages_for(tokens, page_tokens_on(site.device.type))
    cache = TowerCache(site.config, rows + 1, pages, site.device, dtype)
    scratch = cache.allocate(0)
    slots = [cache.allocate(tokens) for _ in range(rows)]
    random = torch.Generator(site.device).manual_seed(2)
    for part in (cache.conv, cache.ssm, cache.keys[:, 2:], cache.values[:, 2:]):
        part.normal_(0, 0.5, generator=random)
    for slot in slots:
        cache.advance(slot, site.cached)
    return cache, slots, scratch
