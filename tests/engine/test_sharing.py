"""Prefixes by name, and room in which what sequences have in common counts once."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.core import DecodingParams, Mode, Request, RequestId, ScoreRequest
from twotower.engine.ledger import Ledger
from twotower.engine.sharing import HeldInCommon, SharedRoom, prefix_names, shared_names
from twotower.model.pages import PAGE_TOKENS, pages_for
from twotower.model.room import Room

STRIDE = 2 * PAGE_TOKENS


def _request(name: str, prompt: tuple[int, ...], mode: Mode = Mode.AR, new: int = 1) -> Request:
    return Request(RequestId(name), prompt, DecodingParams(mode, new))


def test_a_name_is_of_all_tokens_so_far_and_of_the_salt() -> None:
    tokens = tuple(range(100, 100 + 3 * STRIDE + 5))
    names = prefix_names(tokens, STRIDE, "a")
    assert len(names) == 3 and prefix_names(tokens[: 2 * STRIDE], STRIDE, "a") == names[:2]
    assert prefix_names(tokens, 0, "a") == () and prefix_names(tokens[: STRIDE - 1], STRIDE, "a") == ()
    assert prefix_names(tokens, STRIDE, None) == ()
    others = [prefix_names(tokens, STRIDE, "b"), prefix_names((1, *tokens[1:]), STRIDE, "a")]
    assert not any(set(names) & set(other) for other in others)


@pytest.mark.parametrize(("length", "shared"), [(STRIDE + 1, 0), (STRIDE + 2, 1), (2 * STRIDE + 1, 1)])
def test_what_something_is_decided_from_is_not_shared(length: int, shared: int) -> None:
    assert len(shared_names(_request("r", (5,) * length), STRIDE)) == shared
    assert len(shared_names(_request("r", (5,) * length, Mode.MOCK_AR), STRIDE)) == shared
    resumed = Request(RequestId("r"), (5,) * (length - 3), committed=(6,) * 3)
    assert len(shared_names(resumed, STRIDE)) == shared
    score = ScoreRequest(RequestId("s"), (5,) * 500, length - 1)
    assert len(shared_names(score, STRIDE)) == shared


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6))
def test_room_is_what_the_union_of_all_needs_in_whatever_order(seed: int) -> None:
    draw, room = random.Random(seed), SharedRoom(Room(8, 60, first_page=2), STRIDE)
    prompts = [(draw.randint(1, 2),) * (STRIDE * draw.randint(0, 4)) + (9,) * draw.randint(0, 40) for _ in range(12)]
    inside: list[tuple[int, HeldInCommon]] = []
    for _ in range(60):
        if inside and draw.random() < 0.45:
            room.give(inside.pop(draw.randrange(len(inside)))[1])
        else:
            tokens = draw.choice(prompts)
            names, positions = prefix_names(tokens, STRIDE, ""), len(tokens) + draw.randint(0, 30)
            if room.fits(positions, names):
                inside.append((positions, room.take(positions, names)))
        common = {name for _, taken in inside for name in taken.names}
        own = sum(pages_for(positions) - 2 * len(taken.names) for positions, taken in inside)
        assert room.room.free_pages == 60 - own - 2 * len(common)
        assert room.room.free_slots == 8 - len(inside)
    for _, taken in inside:
        room.give(taken)
    assert (room.room.free_slots, room.room.free_pages) == (8, 60)


def _admitted(ledger: Ledger, requests: list[Request]) -> int:
    for request in requests:
        ledger.enqueue(request)
    return len(ledger.admit())


def test_the_ledger_counts_common_prefixes_once_and_gives_all_back() -> None:
    """Ten pages each, of which eight are everybody's: twenty pages have room for two of them, or for six."""
    requests = [_request(str(n), (7,) * (4 * STRIDE) + (n + 10,) * 20, new=8) for n in range(9)]
    assert pages_for(requests[0].positions) == 10
    assert _admitted(Ledger(Room(20, 20), [], 99), requests) == 2
    ledger = Ledger(Room(20, 20), [], 99, stride=STRIDE)
    assert _admitted(ledger, requests) == 6
    for request in requests[:6]:
        ledger.release(request.id)
    assert len(ledger.admit()) == 3
    for request in requests[6:]:
        ledger.release(request.id)
    assert (ledger.context.free_slots, ledger.context.free_pages) == (20, 20)


def test_mirrors_hold_each_by_itself() -> None:
    requests = [_request(str(n), (7,) * (4 * STRIDE) + (n + 10,) * 20, Mode.MOCK_AR, new=8) for n in range(5)]
    assert _admitted(Ledger(Room(20, 20), [Room(20, 30)], 99, stride=STRIDE), requests) == 3


def test_kept_pages_are_free_until_they_are_needed() -> None:
    room, asked = Room(3, 6), list[int]()
    kept = room.take(4 * PAGE_TOKENS)
    room.keep(kept.pages[:3])
    room.give(kept)
    assert (room.free_pages, room.unused_pages, room.kept_pages) == (6, 3, 3)

    def reclaim(pages: int) -> None:
        asked.append(pages)
        room.drop(kept.pages[1:3])

    room.reclaim = reclaim
    shared = room.take(2 * PAGE_TOKENS, kept.pages[:1])
    assert shared.pages[0] == kept.pages[0] and room.free_pages == 4 and not asked
    assert not room.fits(5 * PAGE_TOKENS) and room.fits(4 * PAGE_TOKENS)
    other = room.take(4 * PAGE_TOKENS)
    assert asked == [2] and room.free_pages == 0 and not set(other.pages) & set(shared.pages)
    room.give(shared)
    room.give(other)
    assert (room.free_pages, room.unused_pages, room.kept_pages) == (6, 5, 1)
