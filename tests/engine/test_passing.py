"""The bound of what a pass needs for a moment holds, and is not far from what passes need."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.dispatch_mode import DispatchMode
from tests.goldens import CPU, MODELS, golden, vendored
from twotower.decoding.sampling import TokenParams, sample
from twotower.decoding.unmasking import Blocks, StepParams
from twotower.engine.memory import memory_of
from twotower.engine.passes import EagerPasses, Want
from twotower.engine.passing import _Batch, _batches, _bytes, captured_bytes
from twotower.engine.settings import EngineSettings
from twotower.model.attention import Attention
from twotower.model.cache import TowerCache
from twotower.model.kernels.folded_attention import attend_folded
from twotower.model.rescan import KeptScans
from twotower.model.tower import ContextTower, DenoiserTower

SETTINGS = EngineSettings(max_sequences=5, max_sequence_length=160, cache_tokens=500, prefill_chunk_tokens=64)


class Peak(DispatchMode):
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
        bound = _bytes(tower.config, torch.float32, batch, on_gpu=False)
        assert bound / 3 < peak <= bound, f"{batch}"


@pytest.mark.parametrize("kind", [ContextTower, DenoiserTower])
def test_the_bound_holds_with_folded_heads(
    kind: type[ContextTower | DenoiserTower], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the mask is made anew for every query head of a group, and torch turns it into numbers. Of one row
    that sees much, so that the mask is most of it."""
    product = F.scaled_dot_product_attention

    def with_numbers(queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor) -> Tensor:
        numbers = torch.zeros_like(attn_mask, dtype=queries.dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
        return product(queries, keys, values, attn_mask=numbers)

    monkeypatch.setattr(F, "scaled_dot_product_attention", with_numbers)
    model = vendored("tt_moe")
    tower = model.context if kind is ContextTower else model.denoiser
    for module in tower.modules():
        if isinstance(module, Attention):
            monkeypatch.setattr(module, "attend", attend_folded)
    batch = _Batch(1, 128, 40_000, 1)
    with torch.inference_mode():
        peak = _peak(tower, batch, EngineSettings(1, 40_000))
    bound = _bytes(tower.config, torch.float32, batch, on_gpu=True)
    assert bound / 3 < peak <= bound
    assert peak > _bytes(tower.config, torch.float32, batch, on_gpu=False), "the bound of unfolded heads is not enough"


def test_captures_of_each_tower_keep_their_own() -> None:
    config, settings = vendored("tt_moe").context.config, replace(SETTINGS, capture="on")
    towers: list[list[type[ContextTower] | type[DenoiserTower]]]
    towers = [[ContextTower], [DenoiserTower], [ContextTower, DenoiserTower]]
    of = [captured_bytes(config, settings, torch.bfloat16, each) for each in towers]
    assert of[0] + of[1] == of[2] > 0
    both = [
        memory_of(config, replace(SETTINGS, capture=name), torch.bfloat16, towers[2], on_gpu=on_gpu).passing
        for on_gpu in (False, True)
        for name in ("off", "on")
    ]
    assert both[0] == both[1], "a CPU's programs keep nothing"
    assert both[3] - both[2] == of[2]


def test_room_for_the_scans_of_drafts_is_counted() -> None:
    config, settings = vendored("tt_moe").context.config, replace(SETTINGS, capture="on")
    batch = _Batch(8, 16, 8 * 16 * 16, 8)  # 160 positions and a block more: 11 pages of 16
    beside = captured_bytes(config, settings, torch.float32, [ContextTower]) - _bytes(
        config, torch.float32, batch, True
    )
    room = sum(part.nbytes for part in KeptScans.room(config, 8, 16, CPU, torch.float32))
    assert 0.5 * beside < room <= beside


def _peak(tower: ContextTower | DenoiserTower, batch: _Batch, settings: EngineSettings = SETTINGS) -> int:
    """With the cache as full as it gets."""
    cache = TowerCache(tower.config, settings.max_sequences, settings.pages, CPU, torch.float32)
    each = min(settings.max_sequence_length, settings.pages // batch.rows * 16)
    slots = [cache.allocate(each) for _ in range(batch.rows)]
    for slot in slots:
        cache.advance(slot, each - (batch.width if tower.causal else 0))
    passes, width = EagerPasses(tower, cache), batch.width
    with Peak() as peak:
        if batch.keeps:
            hidden_RLD, scans = passes.verify(slots, [[5] * width] * batch.rows)
            drawn = [TokenParams(0.7, 3, 0.9, 1)] * batch.logits
            sample(tower.logits(hidden_RLD.flatten(0, 1)[: batch.logits]), drawn)
            cache.settle(slots, scans, [width] * batch.rows)
        elif isinstance(tower, ContextTower):
            hidden_RLD = passes.run(slots, [[5] * width] * batch.rows, want=Want.HIDDEN)
            sample(tower.logits(hidden_RLD[:, -1]), [TokenParams(0.7, 3, 0.9, 1)] * batch.rows)
        else:
            rows = [[True] * width] * batch.rows
            passes.step(slots, Blocks([[3] * width] * batch.rows, rows, [StepParams(0.8, 8, 0.7, 1)] * batch.rows))
    return peak.bytes
