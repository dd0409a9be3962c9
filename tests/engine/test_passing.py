"""The bound of what a pass needs for a moment holds, and is not far from what passes need."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.goldens import CPU, MODELS, golden
from twotower.decoding.sampling import TokenParams, sample
from twotower.decoding.unmasking import Blocks, StepParams
from twotower.engine.passes import EagerPasses, Want
from twotower.engine.passing import _Batch, _batches, _bytes
from twotower.engine.settings import EngineSettings
from twotower.model.cache import TowerCache
from twotower.model.tower import ContextTower, DenoiserTower

SETTINGS = EngineSettings(max_sequences=5, max_sequence_length=160, cache_tokens=500, prefill_chunk_tokens=64)


class Peak(TorchDispatchMode):
    """Bytes of all storages that were made and not yet given back, at the worst moment."""

    def __init__(self) -> None:
        super().__init__()
        self._now = self.bytes = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in given and storage._cdata not in self._known:
                self._known[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        self.bytes = max(self.bytes, self._now)
        return out

    def _gone(self, key: int) -> None:
        self._now -= self._known.pop(key, 0)


def _storages(values: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("kind", [ContextTower, DenoiserTower])
@pytest.mark.parametrize("name", MODELS)
def test_the_bound_holds(name: str, kind: type[ContextTower | DenoiserTower]) -> None:
    tower = golden(name).context if kind is ContextTower else golden(name).denoiser
    for batch in _batches(tower.config, SETTINGS, kind):
        with torch.inference_mode():
            peak = _peak(tower, batch)
        bound = _bytes(tower.config, torch.float32, batch)
        assert bound / 3 < peak <= bound, f"{batch}"


def _peak(tower: ContextTower | DenoiserTower, batch: _Batch) -> int:
    """With the cache as full as it gets."""
    cache = TowerCache(tower.config, SETTINGS.max_sequences, SETTINGS.pages, CPU, torch.float32)
    each = min(SETTINGS.max_sequence_length, SETTINGS.pages // batch.rows * 16)
    slots = [cache.allocate(each) for _ in range(batch.rows)]
    for slot in slots:
        cache.advance(slot, each - (batch.width if tower.causal else 0))
    passes, width = EagerPasses(tower, cache), batch.width
    with Peak() as peak:
        if isinstance(tower, ContextTower):
            hidden_RLD = passes.run(slots, [[5] * width] * batch.rows, want=Want.HIDDEN)
            sample(tower.logits(hidden_RLD[:, -1]), [TokenParams(0.7, 3, 0.9, 1)] * batch.rows)
        else:
            rows = [[True] * width] * batch.rows
            passes.step(slots, Blocks([[3] * width] * batch.rows, rows, [StepParams(0.8, 8, 0.7, 1)] * batch.rows))
    return peak.bytes
