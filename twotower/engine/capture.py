"""Which kind of passes an engine uses for its usual shapes."""

import torch

from twotower.config import ModelConfig
from twotower.engine.graphs import FixedPasses
from twotower.engine.passes import SHORT_PROMPT, USUAL_WIDTH, EagerPasses, Passes
from twotower.engine.recorded import OFTEN, RecordedPasses
from twotower.engine.settings import Capture
from twotower.errors import ConfigError
from twotower.model.cache import TowerCache
from twotower.model.moe import grouped_products_wait
from twotower.model.quantised import QuantisedExperts, plain_product
from twotower.model.tower import ContextTower, DenoiserTower

_NEVER = 1 << 62


def passes_for(
    tower: ContextTower | DenoiserTower, cache: TowerCache, capture: str, longest: int | None = None
) -> Passes:
    """`on` captures all passes of the usual widths here, before anything is served, and none later. `auto` records on a
    CPU the passes that come up often; on CUDA it captures nothing, because no capture has been seen running there yet.

    `longest`: positions of the longest sequence, where that is less than the whole cache. Raises what
    `check_capture` does.
    """
    check_capture(capture, tower.config, tower.device, tower.dtype)
    if capture == "on":
        _check_products(tower)
        return _captured(tower, cache, longest)
    if capture == "auto" and tower.device.type == "cpu":
        return RecordedPasses(tower, cache, often=OFTEN)
    return EagerPasses(tower, cache)


def check_capture(capture: str, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError for an unknown name, and for `on` if a capture would break."""
    if capture not in tuple(Capture):
        raise ConfigError(f"capture: got {capture!r}, wanted one of {', '.join(Capture)}")
    if config.experts is not None:
        if capture == "on" and device.type == "cuda" and dtype is not torch.bfloat16:
            raise ConfigError(
                f"capture: got 'on' for experts in {config.experts.word} of a model in {_name_of(dtype)}, whose "
                "products make the host wait; wanted dtype bfloat16, or capture auto or off"
            )
        return
    if capture == "on" and "E" in config.hybrid_override_pattern and grouped_products_wait(device, dtype):
        kind, (major, minor) = _name_of(dtype), torch.cuda.get_device_capability(device)
        raise ConfigError(
            f"capture: got 'on' for experts in {kind} on a GPU of compute capability {major}.{minor}, whose products "
            "make the host wait; wanted dtype bfloat16 and capability 9 or 10, or capture auto or off"
        )


def _check_products(tower: ContextTower | DenoiserTower) -> None:
    """Which kernel multiplies is known only after a trial on the device."""
    plain = (isinstance(part, QuantisedExperts) and part.product is plain_product for part in tower.modules())
    if tower.device.type == "cuda" and any(plain):
        raise ConfigError(
            "capture: got 'on' for quantised experts without the Triton kernel, whose products make the host wait "
            f"({tower.kernels}); wanted capture auto or off"
        )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _captured(tower: ContextTower | DenoiserTower, cache: TowerCache, longest: int | None) -> Passes:
    passes: Passes
    if tower.device.type == "cuda":
        passes = FixedPasses(tower, cache, cache.scratch_slot, longest=longest)
    else:
        passes = RecordedPasses(tower, cache, often=_NEVER)
    widest = SHORT_PROMPT if tower.causal else USUAL_WIDTH
    for width in (*range(widest, 0, -USUAL_WIDTH), 1):
        passes.prepare(width)
    return passes
