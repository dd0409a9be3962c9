"""Pages of different sizes: who decides on them, what counts by them, and that a delta does not know them."""

import pytest
import torch

from tests.goldens import CPU, vendored
from twotower.engine.settings import EngineSettings
from twotower.engine.sharing import SharedRoom
from twotower.errors import Overloaded
from twotower.model.cache import Span, TowerCache
from twotower.model.pages import page_tokens_on, pages_for
from twotower.model.room import Room


def test_the_device_decides() -> None:
    assert (page_tokens_on("cpu"), page_tokens_on("cuda")) == (16, 256)
    config = vendored("tt_moe").checkpoint.config
    assert TowerCache(config, 1, 1, CPU, torch.float32).keys.shape[2] == 16
    assert TowerCache(config, 1, 1, torch.device("meta"), torch.float32, page_tokens=256).keys.shape[2] == 256


@pytest.mark.parametrize(("tokens", "page", "pages"), [(0, 256, 0), (1, 256, 1), (256, 256, 1), (257, 256, 2)])
def test_pages_for(tokens: int, page: int, pages: int) -> None:
    assert pages_for(tokens, page) == Room(1, 9, page_tokens=page).pages_for(tokens) == pages


def test_a_room_counts_by_its_pages() -> None:
    room = Room(3, 3, page_tokens=256)
    assert room.fits(768) and not room.fits(769)
    first = room.take(257)
    assert len(first.pages) == 2 and room.free_pages == 1
    with pytest.raises(Overloaded, match="wanted 1 slot and 2 pages, got 2 slots and 1 pages free"):
        room.take(300)
    shared = SharedRoom(Room(3, 3, page_tokens=256), stride=512)
    taken = [shared.take(600, [b"name"]) for _ in range(1)]
    assert shared.fits(600, [b"name"]) is False and shared.fits(512, [b"name"])
    shared.give(taken[0])
    assert shared.room.free_pages == 3


def test_settings_round_each_sequence_up_to_a_large_page() -> None:
    small = EngineSettings(max_sequences=5, max_sequence_length=60)
    assert (small.pages, small.pages_of(16), small.pages_of(256)) == (19, 19, 5)
    usual = EngineSettings()
    assert (usual.pages_of(16), usual.pages_of(256)) == (32 * 256, 32 * 16)
    assert EngineSettings(cache_tokens=1000).pages_of(256) == 4
    assert (usual.prefix_stride, usual.prefix_stride_of(256)) == (512, 512)
    assert EngineSettings(prefill_chunk_tokens=96).prefix_stride_of(256) == 768
    assert EngineSettings(prefix_cache_bytes=0).prefix_stride_of(256) == 0
    assert EngineSettings(cache_tokens=1024).snapshots(1000, 256) == 2, "no more prefixes than pages hold"


@pytest.mark.parametrize(("ours", "theirs"), [(16, 256), (256, 16)])
def test_a_delta_goes_from_pages_of_one_size_into_those_of_another(ours: int, theirs: int) -> None:
    """The wire counts positions: a split pair with a tower on either device would understand itself."""
    config, spans = vendored("tt_moe").checkpoint.config, [(0, 250), (250, 266), (266, 267)]
    cache, mirror = (
        TowerCache(config, 1, pages_for(300, size), CPU, torch.float32, page_tokens=size) for size in (ours, theirs)
    )
    slot, place = cache.allocate(300), mirror.allocate(300)
    for part in (cache.keys[:, 2:], cache.values[:, 2:], cache.conv, cache.ssm):
        part.normal_(generator=torch.Generator().manual_seed(1))
    cache.advance(slot, 267)
    for start, end in spans:
        mirror.apply([Span(place, start, end)], cache.delta([Span(slot, start, end)]))
    assert mirror.length(place) == 267
    for part in ("keys", "values"):
        held = [
            getattr(of, part).flatten(1, 2)[:, of.flat_positions(at, 0, 267)]
            for of, at in ((cache, slot), (mirror, place))
        ]
        assert torch.equal(*held)
    assert torch.equal(cache.ssm[:, slot], mirror.ssm[:, place])
