"""Admission: by priority, then first come, first served; all or nothing, never over capacity, everything given back."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from twotower.core import AnyRequest, DecodingParams, Mode, Request, RequestId, ScoreRequest
from twotower.engine.ledger import Ledger, Place
from twotower.errors import InvalidRequest, Overloaded
from twotower.model.pages import pages_for
from twotower.model.room import Room


def _request(name: int | str, prompt: int = 16, new: int = 16, mode: Mode = Mode.AR, priority: int = 0) -> Request:
    params = DecodingParams(mode=mode, max_new_tokens=new)
    return Request(RequestId(str(name)), tuple(range(prompt)), params, priority)


def _score(name: int | str, tokens: int = 17, priority: int = 0) -> ScoreRequest:
    return ScoreRequest(RequestId(str(name)), tuple(range(tokens)), 1, priority)


def _pages(place: Place) -> list[int]:
    return [len(place.held.held.pages), *([len(place.mirrored[1].pages)] if place.mirrored else [])]


def _admitted(ledger: Ledger) -> list[str]:
    return [request.id for request, _ in ledger.admit()]


def test_first_come_first_served() -> None:
    ledger = Ledger(Room(4, 6), [], 10)
    for name, new in [("big", 64), ("huge", 80), ("small", 16)]:
        ledger.enqueue(_request(name, new=new))
    assert _admitted(ledger) == ["big"], "small must not overtake huge"
    assert ledger.waiting == 2 and ledger.running == 1
    ledger.release(RequestId("big"))
    assert _admitted(ledger) == ["huge"]
    assert (ledger.context.free_slots, ledger.context.free_pages) == (3, 0)
    ledger.release(RequestId("huge"))
    assert _admitted(ledger) == ["small"]


def _one_by_one(ledger: Ledger) -> list[str]:
    """The order in which a cell of one slot serves what waits."""
    order: list[str] = []
    while ledger.waiting:
        order += _admitted(ledger)
        ledger.release(RequestId(order[-1]))
    return order


def test_lower_goes_first_and_equals_as_they_came() -> None:
    ledger = Ledger(Room(1, 100), [], 10)
    for name, priority in [("a", 0), ("b", 5), ("c", -1), ("d", 0), ("e", 5), ("f", -1), ("g", 2**31 - 1)]:
        ledger.enqueue(_request(name, priority=priority))
    assert _one_by_one(ledger) == list("cfadbeg")


def test_nobody_is_passed_for_ever() -> None:
    """Urgent requests that never stop coming: the others lose so many places each, then hold theirs."""
    ledger = Ledger(Room(1, 100), [], 100, max_passed=3)
    ledger.enqueue(_request("late", priority=1))
    ledger.enqueue(_request("later", priority=2))
    for number in range(8):
        ledger.enqueue(_request(number))
    assert _one_by_one(ledger) == ["0", "1", "2", "late", "later", "3", "4", "5", "6", "7"]


def test_a_head_that_waits_for_room_gets_it() -> None:
    ledger = Ledger(Room(4, 6), [], 100, max_passed=2)
    ledger.enqueue(_request("running"))
    assert _admitted(ledger) == ["running"]
    ledger.enqueue(_request("whole", new=81, priority=1))
    for number in range(9):
        ledger.enqueue(_request(number))
    assert _admitted(ledger) == ["0", "1"], "two may pass, the others wait behind the head"
    for name in ("running", "0", "1"):
        ledger.release(RequestId(name))
    assert _admitted(ledger) == ["whole"]


def test_a_full_queue_refuses_the_urgent_too() -> None:
    ledger = Ledger(Room(1, 100), [], 1)
    ledger.enqueue(_request("a"))
    assert _admitted(ledger) == ["a"]
    ledger.enqueue(_request("b"))
    with pytest.raises(Overloaded):
        ledger.enqueue(_request("c", priority=-9))


def test_full_queue() -> None:
    ledger = Ledger(Room(1, 100), [], 2)
    ledger.enqueue(_request("a"))
    assert _admitted(ledger) == ["a"]
    ledger.enqueue(_request("b"))
    ledger.enqueue(_request("c"))
    with pytest.raises(Overloaded, match="2 requests are waiting and 1 running; wanted fewer than 2"):
        ledger.enqueue(_request("d"))
    assert ledger.waiting == 2
    assert ledger.withdraw(RequestId("b")) and not ledger.withdraw(RequestId("b"))
    ledger.enqueue(_request("d"))


def test_without_a_queue_what_fits_still_starts() -> None:
    ledger = Ledger(Room(1, 100), [], 0)
    ledger.enqueue(_request("a"))
    assert _admitted(ledger) == ["a"]
    with pytest.raises(Overloaded):
        ledger.enqueue(_request("b"))


def test_what_can_never_fit_is_refused_for_good() -> None:
    ledger = Ledger(Room(4, 6), [], 10)
    with pytest.raises(InvalidRequest, match=r"max_new_tokens: got .*97 positions \(7 pages\), wanted at most 6"):
        ledger.enqueue(_request("a", prompt=18, new=80))
    ledger.enqueue(_request("b", prompt=17, new=80))


def test_the_roomiest_mirror_is_chosen() -> None:
    ledger = Ledger(Room(8, 100), [Room(2, 10), Room(3, 10)], 10)
    for name in range(4):
        ledger.enqueue(_request(name, mode=Mode.DIFFUSION))
    assert [place.denoiser for _, place in ledger.admit()] == [1, 0, 1, 0]
    assert [(room.free_slots, room.free_pages) for room in ledger.mirrors] == [(0, 8), (1, 8)]
    ledger.enqueue(_request("ar"))
    assert [place.denoiser for _, place in ledger.admit()] == [None]
    assert [(room.free_slots, room.free_pages) for room in ledger.mirrors] == [(0, 8), (1, 8)]


def test_scoring_takes_a_place_on_the_context_tower_only_and_in_the_same_order() -> None:
    ledger = Ledger(Room(2, 3), [Room(2, 3)], 10)
    ledger.enqueue(_request("a", new=1))
    ledger.enqueue(_score("long", 34, priority=1))
    ledger.enqueue(_score("short", 17))
    assert [(request.id, _pages(place), place.denoiser) for request, place in ledger.admit()] == [
        ("a", [1], None),
        ("short", [1], None),
    ]
    assert (ledger.mirrors[0].free_slots, ledger.mirrors[0].free_pages) == (2, 3)
    for name in ("a", "short"):
        ledger.release(RequestId(name))
    assert _admitted(ledger) == ["long"] and ledger.context.free_pages == 0
    with pytest.raises(InvalidRequest, match=r"token_ids: got .*49 positions \(4 pages\), wanted at most 3"):
        ledger.enqueue(_score("too long", 50))


def test_both_caches_or_neither() -> None:
    ledger = Ledger(Room(8, 100), [Room(1, 2)], 10)
    for name in range(2):
        ledger.enqueue(_request(name, mode=Mode.MOCK_AR))
    assert _admitted(ledger) == ["0"]
    assert (ledger.context.free_slots, ledger.context.free_pages) == (7, 98)


SLOTS, PAGES, MIRROR, QUEUE, PASSED = 3, 12, (2, 8), 5, 2


class LedgerMachine(RuleBasedStateMachine):
    """Random schedules against a model that counts everything anew."""

    @initialize(mirrors=st.integers(0, 2))
    def begin(self, mirrors: int) -> None:
        self.ledger = Ledger(Room(SLOTS, PAGES), [Room(*MIRROR) for _ in range(mirrors)], QUEUE, PASSED)
        self.mirrors = mirrors
        self.next = 0
        self.waiting: list[AnyRequest] = []
        self.running: dict[str, tuple[AnyRequest, int | None]] = {}
        self.passed: dict[str, int] = {}

    @rule(
        prompt=st.integers(1, 60),
        new=st.integers(1, 60),
        mode=st.sampled_from([*Mode, None]),
        priority=st.integers(-1, 1),
    )
    def arrive(self, prompt: int, new: int, mode: Mode | None, priority: int) -> None:
        """Without a mode it is scoring."""
        request: AnyRequest = _score(self.next, prompt + new, priority)
        if mode is not None:
            request = _request(self.next, prompt, new, mode, priority)
        # With mirrors smaller than the context cache a request may wait for ever; the pair sizes them alike.
        if self.mirrors and request.needs_denoiser and pages_for(request.positions) > MIRROR[1]:
            return
        self.next += 1
        try:
            self.ledger.enqueue(request)
        except Overloaded:
            assert len(self.waiting) >= QUEUE
        except InvalidRequest:
            assert pages_for(request.positions) > PAGES
        else:
            self._queue_up(request)

    def _queue_up(self, request: AnyRequest) -> None:
        """Behind the last that it may not pass."""
        stays = [w.priority <= request.priority or self.passed[w.id] == PASSED for w in self.waiting]
        place = len(stays) - stays[::-1].index(True) if any(stays) else 0
        for waiting in self.waiting[place:]:
            self.passed[waiting.id] += 1
        self.waiting.insert(place, request)
        self.passed[request.id] = 0

    @rule()
    def admit(self) -> None:
        for request, place in self.ledger.admit():
            assert request == self.waiting.pop(0), "out of order"
            rooms = 2 if self.mirrors and request.needs_denoiser else 1
            assert _pages(place) == [pages_for(request.positions)] * rooms
            assert request.needs_denoiser == (place.denoiser is not None)
            self.running[request.id] = (request, place.denoiser)

    @invariant()
    def equals_wait_in_the_order_they_came(self) -> None:
        for priority in (-1, 0, 1):
            came = [int(request.id) for request in self.waiting if request.priority == priority]
            assert came == sorted(came)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        self.ledger.release(RequestId(name))
        del self.running[name]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.waiting))
        assert self.ledger.withdraw(request.id)
        self.waiting.remove(request)

    @invariant()
    def the_books_are_right(self) -> None:
        pages = sum(pages_for(request.positions) for request, _ in self.running.values())
        assert (self.ledger.context.free_slots, self.ledger.context.free_pages) == (
            SLOTS - len(self.running),
            PAGES - pages,
        )
        assert self.ledger.context.free_slots >= 0 and self.ledger.context.free_pages >= 0
        for number, room in enumerate(self.ledger.mirrors):
            mine = [request for request, mirror in self.running.values() if mirror == number]
            used = sum(pages_for(request.positions) for request in mine)
            assert (room.free_slots, room.free_pages) == (MIRROR[0] - len(mine), MIRROR[1] - used)
            assert room.free_slots >= 0 and room.free_pages >= 0
        assert (self.ledger.waiting, self.ledger.running) == (len(self.waiting), len(self.running))

    def teardown(self) -> None:
        """When all that runs has ended, all that waits gets in."""
        while self.waiting or self.running:
            for name in list(self.running):
                self.ledger.release(RequestId(name))
                del self.running[name]
            before = len(self.waiting)
            self.admit()
            assert not before or len(self.waiting) < before, "an empty cell admits nobody"
        self.the_books_are_right()


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(deadline=None, derandomize=True, max_examples=60, stateful_step_count=30)
