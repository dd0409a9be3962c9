"""Rows of one forward do not see each other, nor each other's padding, nor what an earlier tenant left behind."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.goldens import CPU, MODELS, Golden, golden
from twotower.model.cache import Span, TowerCache
from twotower.model.tower import ContextTower, DenoiserTower

NAMES = pytest.mark.parametrize("name", MODELS)
CLOSE = 1e-5  # of the largest number compared: matrix products of one row and of many differ by some 3e-6


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _cache(model: Golden) -> TowerCache:
    return TowerCache(model.checkpoint.config, 6, 24, CPU, torch.float32)


def _tokens(model: Golden, count: int, seed: int) -> list[int]:
    ids = torch.randint(4, model.checkpoint.config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))
    return [int(token) for token in ids]


def _extend(tower: ContextTower, cache: TowerCache, slots: list[int], rows: list[list[int]]) -> list[Tensor]:
    """Logits of each row's own positions; all rows in one padded pass."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    logits = tower.logits(tower(padded, cache.extending(slots, lengths, width)))
    for slot, length in zip(slots, lengths, strict=True):
        cache.advance(slot, length)
    return [logits[r, :length] for r, length in enumerate(lengths)]


def _state(cache: TowerCache, slot: int) -> list[Tensor]:
    return cache.delta([Span(slot, 0, cache.length(slot))])


def _close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).abs().max().item() <= CLOSE * max(1.0, other.abs().max().item())


@NAMES
@pytest.mark.parametrize("rounds", [[(21, 1, 40), (16, 16, 3)], [(1, 2, 1), (1, 33, 2), (5, 1, 17)]])
def test_ragged_extension_is_row_by_row_extension(name: str, rounds: list[tuple[int, ...]]) -> None:
    model = golden(name)
    together, alone = _cache(model), _cache(model)
    ours = [together.allocate(96) for _ in range(3)]
    theirs = [alone.allocate(96) for _ in range(3)]
    for number, lengths in enumerate(rounds):
        rows = [_tokens(model, n, 10 * number + r) for r, n in enumerate(lengths)]
        batched = _extend(model.context, together, ours, rows)
        single = [_extend(model.context, alone, [s], [row])[0] for s, row in zip(theirs, rows, strict=True)]
        _close(batched, single)
    for mine, other in zip(ours, theirs, strict=True):
        _close(_state(together, mine), _state(alone, other))


@NAMES
def test_ragged_denoising_is_row_by_row_denoising(name: str) -> None:
    model = golden(name)
    cache = _cache(model)
    slots, blocks, times = [], [], []
    for row, (prompt, size) in enumerate([(33, 16), (1, 3), (7, 32), (18, 8)]):
        slots.append(cache.allocate(80))
        _extend(model.context, cache, slots[-1:], [_tokens(model, prompt, row)])
        blocks.append([3 if i % 2 else token for i, token in enumerate(_tokens(model, size, 50 + row))])
        times.append((row + 1) / 5)
    before = [_state(cache, slot) for slot in slots]
    together = _denoise(model.denoiser, cache, slots, blocks, times)
    for row, slot in enumerate(slots):
        alone = _denoise(model.denoiser, cache, [slot], [blocks[row]], [times[row]])
        _close([together[row]], alone)
        assert all(torch.equal(a, b) for a, b in zip(_state(cache, slot), before[row], strict=True)), "a pass wrote"


def _denoise(
    tower: DenoiserTower, cache: TowerCache, slots: list[int], blocks: list[list[int]], times: list[float]
) -> list[Tensor]:
    lengths = [len(block) for block in blocks]
    width = max(lengths)
    padded = torch.tensor([block + [0] * (width - len(block)) for block in blocks])
    logits = tower.logits(tower(padded, cache.reading(slots, lengths, width), torch.tensor(times)))
    return [logits[r, :length] for r, length in enumerate(lengths)]


@NAMES
def test_a_nan_stays_in_its_row_and_dies_with_its_tenant(name: str) -> None:
    model = golden(name)
    sick = 7
    tower = copy.deepcopy(model.context)
    tower.embeddings.weight[sick] = torch.nan
    healthy, ill = [5, 6, 9, 10, 11] * 4, [5, sick, 6]
    clean, shared = _cache(model), _cache(model)
    [wanted] = _extend(tower, clean, [clean.allocate(40)], [healthy])
    slots = [shared.allocate(40), shared.allocate(40)]
    nan, fine = _extend(tower, shared, slots, [ill, healthy])
    assert nan.isnan().any()
    _close([fine], [wanted])
    shared.free(slots[0])
    tenant = shared.allocate(40)
    assert tenant == slots[0]
    [again] = _extend(tower, shared, [tenant], [healthy])
    _close([again], [wanted])
    _close(_state(shared, tenant), _state(clean, 0))
    together = _denoise(model.denoiser, shared, [tenant, slots[1]], [[3] * 8, [3] * 4], [1.0, 1.0])
    assert all(row.isfinite().all() for row in together)
