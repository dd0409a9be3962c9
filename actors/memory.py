"""The memory that each process of a cell will allocate, computed before any is started."""

import torch

from actors.settings import CellSettings
from twotower.device_names import parse_device
from twotower.engine.in_process import pick_dtype
from twotower.engine.memory import Memory, memory_of
from twotower.exchange.staging import fitted
from twotower.model.cache import TowerCache
from twotower.model.checkpoint import Checkpoint
from twotower.model.tower import ContextTower, DenoiserTower


def memories(settings: CellSettings) -> list[Memory]:
    """One for each tower process, in the order of their bundles. Raises CheckpointError or ConfigError."""
    config = Checkpoint.open(settings.checkpoint, settings.engine.expert_format).config
    dtype = pick_dtype(settings.dtype)
    on_gpu = parse_device(settings.device).kind == "cuda"
    if settings.placement != "split":
        towers = (ContextTower,) if settings.placement == "ar_only" else (ContextTower, DenoiserTower)
        return [memory_of(config, settings.engine, dtype, towers, on_gpu=on_gpu)]
    denoisers, engine = settings.denoisers_per_context, settings.engine
    cache = TowerCache(config, engine.max_sequences, engine.pages, torch.device("meta"), dtype)
    link = fitted(settings.link_settings, cache, engine.longest_delta)
    context = memory_of(config, settings.engine, dtype, [ContextTower], denoisers, link, on_gpu)
    return [context, *[memory_of(config, settings.engine, dtype, [DenoiserTower], 1, link, on_gpu)] * denoisers]
