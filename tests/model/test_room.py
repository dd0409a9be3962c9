"""The room of a cache: all or nothing, nothing twice, everything given back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.errors import Overloaded
from twotower.model.pages import PAGE_TOKENS, pages_for
from twotower.model.room import Held, Room

SLOTS, PAGES, FIRST = 3, 6, 2


@settings(deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(0, (PAGES + 2) * PAGE_TOKENS), st.none()), max_size=40))
def test_nothing_is_lost_or_given_twice(schedule: list[int | None]) -> None:
    """Numbers take room for that many positions, None gives back the oldest."""
    room, held = Room(SLOTS, PAGES, FIRST), list[Held]()
    for positions in schedule:
        used = [page for each in held for page in each.pages]
        if positions is None:
            if held:
                room.give(held.pop(0))
        elif len(held) < SLOTS and len(used) + pages_for(positions) <= PAGES:
            assert room.fits(positions)
            held.append(room.take(positions))
            assert len(held[-1].pages) == pages_for(positions)
        else:
            assert not room.fits(positions)
            with pytest.raises(
                Overloaded, match=f"wanted 1 slot and {pages_for(positions)} pages, got {SLOTS - len(held)} "
            ):
                room.take(positions)
        slots, pages = [each.slot for each in held], [page for each in held for page in each.pages]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(SLOTS))
        assert len(set(pages)) == len(pages) and set(pages) <= set(range(FIRST, FIRST + PAGES))
        assert (room.free_slots, room.free_pages) == (SLOTS - len(slots), PAGES - len(pages))
    assert (room.slots, room.pages) == (SLOTS, PAGES)
