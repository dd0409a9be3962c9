"""Which kind of passes an engine makes of its usual shapes."""

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
    if capture not in CAPTURES:
        raise ConfigError(f"capture: got {capture!r}, wanted one of {', '.join(CAPTURES)}")
    if capture == "on" and tower.device.type == "cuda":
        return FixedPasses(tower, cache, cache.scratch_slot)
    if capture != "off" and tower.device.type == "cpu":
        return RecordedPasses(tower, cache, often=1 if capture == "on" else OFTEN)
    return EagerPasses(tower, cache)
