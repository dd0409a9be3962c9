"""Slots and pages: given out, given back, zeroed for the next tenant, carried to a mirror by deltas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.goldens import CPU, vendored
from twotower.errors import Overloaded
from twotower.model.cache import Span, TowerCache
from twotower.model.pages import PAGE_TOKENS, pages_for

SLOTS, PAGES = 3, 6


def _cache(slots: int = SLOTS, pages: int = PAGES) -> TowerCache:
    return TowerCache(vendored("tt_moe").checkpoint.config, slots, pages, CPU, torch.float32)


def _read(cache: TowerCache, slot: int, tokens: list[int]) -> None:
    with torch.inference_mode():
        vendored("tt_moe").context(torch.tensor([tokens]), cache.extending([slot], [len(tokens)], len(tokens)))
    cache.advance(slot, len(tokens))


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens) == pages


@settings(deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(0, PAGES * PAGE_TOKENS), st.none()), max_size=40))
def test_nothing_is_lost_or_given_twice(schedule: list[int | None]) -> None:
    """Numbers allocate that many positions, None frees the oldest."""
    cache = _cache()
    held: dict[int, int] = {}
    for tokens in schedule:
        assert tokens is None or cache.room.fits(tokens) == (
            len(held) < SLOTS and sum(held.values()) + pages_for(tokens) <= PAGES
        )
        if tokens is None:
            if held:
                slot = next(iter(held))
                cache.free(slot)
                del held[slot]
        elif len(held) < SLOTS and sum(held.values()) + pages_for(tokens) <= PAGES:
            slot = cache.allocate(tokens)
            assert slot not in held
            held[slot] = pages_for(tokens)
        else:
            with pytest.raises(Overloaded):
                cache.allocate(tokens)
        assert cache.room.free_slots == SLOTS - len(held)
        assert cache.room.free_pages == PAGES - sum(held.values())
        pages = [page for slot in held for page in cache.page_table([slot], held[slot] * PAGE_TOKENS)[0].tolist()]
        assert len(set(pages)) == len(pages) and not set(pages) & {0, 1}


def test_a_refused_allocation_takes_nothing() -> None:
    cache = _cache()
    with pytest.raises(Overloaded, match="wanted 1 slot and 7 pages, got 3 slots and 6 pages"):
        cache.allocate(PAGES * PAGE_TOKENS + 1)
    assert (cache.room.free_slots, cache.room.free_pages) == (SLOTS, PAGES)


def test_the_next_tenant_finds_zeros() -> None:
    cache = _cache(1, 4)
    first = cache.allocate(64)
    _read(cache, first, list(range(5, 60)))
    for memory in (cache.conv, cache.ssm, cache.keys, cache.values):
        assert memory.abs().sum() > 0
    cache.free(first)
    second = cache.allocate(64)
    assert second == first and cache.length(second) == 0
    assert not cache.conv[:, second].any() and not cache.ssm[:, second].any()
    for tensor in cache.delta([Span(second, 0, 64)]):
        assert not tensor.any()


def test_deltas_make_a_mirror() -> None:
    source, mirror = _cache(), _cache()
    # Other slots and pages on the other side.
    mirror.allocate(20)
    slot, copy = source.allocate(60), mirror.allocate(60)
    _read(source, slot, list(range(5, 25)))
    mirror.apply([Span(copy, 0, 20, False)], source.delta([Span(slot, 0, 20, False)]))
    assert not mirror.ssm[:, copy].any()
    _read(source, slot, list(range(30, 50)))
    mirror.apply([Span(copy, 20, 40)], source.delta([Span(slot, 20, 40)]))
    assert mirror.length(copy) == 40
    for ours, theirs in zip(mirror.delta([Span(copy, 0, 40)]), source.delta([Span(slot, 0, 40)]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tokens", [1, 16, 20])
@pytest.mark.parametrize("with_states", [True, False])
def test_delta_shapes_are_what_delta_yields(tokens: int, with_states: bool) -> None:
    cache = _cache()
    slot = cache.allocate(40)
    _read(cache, slot, list(range(5, 5 + tokens)))
    spans = [Span(slot, 0, tokens, with_states)]
    assert cache.delta_shapes(tokens, int(with_states)) == [(t.shape, t.dtype) for t in cache.delta(spans)]


def test_outgrowing_the_reservation_is_our_own_fault() -> None:
    cache = _cache()
    slot = cache.allocate(16)
    with pytest.raises(AssertionError):
        cache.advance(slot, 17)


def test_size_is_what_the_numbers_say() -> None:
    config, cache = vendored("tt_moe").checkpoint.config, _cache()
    page = PAGE_TOKENS * config.num_key_value_heads * config.head_dim * 4
    mamba, attention = len(config.layers_of("M")), len(config.layers_of("*"))
    conv = config.conv_kernel * config.conv_channels * 4
    ssm = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * 4
    assert cache.nbytes == mamba * (SLOTS + 1) * (conv + ssm) + 2 * attention * (PAGES + 2) * page


def test_several_spans_go_as_one() -> None:
    """Side by side, of different lengths, one of them without its states: as one after the other."""
    source, together, apart = _cache(4, 16), _cache(4, 16), _cache(4, 16)
    slots = [source.allocate(40) for _ in range(3)]
    for number, slot in enumerate(slots):
        _read(source, slot, list(range(5 + number, 12 + 3 * number)))
    ends = [source.length(slot) for slot in slots]
    copies = [[cache.allocate(40) for _ in slots] for cache in (together, apart)]
    states = [True, False, True]
    theirs = [Span(*span) for span in zip(slots, [0] * 3, ends, states, strict=True)]
    ours = [[Span(*span) for span in zip(copy, [0] * 3, ends, states, strict=True)] for copy in copies]
    together.apply(ours[0], source.delta(theirs))
    for one, of in zip(ours[1], theirs, strict=True):
        apart.apply([one], source.delta([of]))
    for left, right in zip(together.delta(ours[0]), apart.delta(ours[1]), strict=True):
        assert torch.equal(left, right) and left.any()
    assert not together.ssm[:, copies[0][1]].any(), "states that were not sent"
    assert [together.length(slot) for slot in copies[0]] == ends
