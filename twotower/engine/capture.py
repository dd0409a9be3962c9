"""Which kind of passes and decisions an engine makes of its usual shapes."""

import torch

from twotower.engine.decisions import Decisions
from twotower.engine.graphs import FixedPasses
from twotower.engine.passes import EagerPasses, Passes
from twotower.engine.recorded import OFTEN, RecordedPasses
from twotower.errors import ConfigError
from twotower.model.cache import TowerCache
from twotower.model.tower import ContextTower, DenoiserTower

CAPTURES = ("auto", "on", "off")


def passes_for(tower: ContextTower | DenoiserTower, cache: TowerCache, capture: str) -> Passes:
    """On a CPU, `auto` captures what comes up often and `on` everything at once; on CUDA only `on` captures, because no
    capture has been seen running there yet."""
    often = _recorded_after(tower.device, capture)
    if often is not None:
        return RecordedPasses(tower, cache, often)
    if capture == "on" and tower.device.type == "cuda":
        return FixedPasses(tower, cache, cache.scratch_slot)
    return EagerPasses(tower, cache)


def decisions_for(device: torch.device, capture: str) -> Decisions:
    """Recorded where passes are."""
    return Decisions(device, _recorded_after(device, capture))


def _recorded_after(device: torch.device, capture: str) -> int | None:
    """Uses after which a form is recorded; None where nothing is."""
    if capture not in CAPTURES:
        raise ConfigError(f"capture: got {capture!r}, wanted one of {', '.join(CAPTURES)}")
    if capture == "off" or device.type != "cpu":
        return None
    return 1 if capture == "on" else OFTEN
