"""Whose request goes to the cells next, by itself and behind both gates of a router: places, then turns."""

import asyncio
from contextlib import ExitStack

import pytest

from cluster.config import ServiceConfig
from cluster.faces.grpc.gate import caller_of
from cluster.router import turns
from cluster.runs.admission import Admission
from cluster.runs.callers import NOBODY, Caller
from cluster.runs.cell_lines import Sums
from cluster.runs.deadline import Deadline
from cluster.runs.generation import Ask, Checked, Generation
from cluster.runs.run import Patience
from cluster.runs.turns import Turns
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, generation, served_model, tokens
from tests.cluster.runs.script import GONE, WELL, Script, Stay
from twotower.core import Mode
from twotower.engine.ledger import MAX_PASSED
from twotower.errors import DeadlineExceeded, Overloaded, Unavailable

FLOOD, OTHER, THIRD = Caller("10.0.0.1"), Caller("10.0.0.2"), Caller("10.0.0.3")


class Queue:
    """Takers in tasks of their own, and in which order they have had their turns."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def joins(self, name: str, caller: Caller, priority: int = 0) -> None:
        async def take() -> None:
            await self.turns.take(caller, priority)
            self.order.append(name)

        self.tasks[name] = asyncio.create_task(take())
        await asyncio.sleep(0)

    async def ends(self, caller: Caller) -> None:
        self.turns.give_back(caller)
        for _ in range(3):
            await asyncio.sleep(0)


async def test_a_flood_waits_behind_itself() -> None:
    queue = Queue(Turns(lambda: 4))
    for number in range(500):
        await queue.joins(f"flood {number}", FLOOD)
    await queue.joins("other", OTHER)
    assert len(queue.order) == 4 and queue.turns.waiting == 497
    await queue.ends(FLOOD)
    assert queue.order[4] == "other", "served next, not after 496 others"
    await queue.joins("third", THIRD)
    await queue.ends(FLOOD)
    assert queue.order[5] == "third"
    await queue.ends(OTHER)
    assert queue.order[6:] == ["flood 4"], "nothing is lost for the flood either, in its order"
    for task in queue.tasks.values():
        task.cancel()


async def test_callers_that_all_flood_share_the_cells() -> None:
    queue = Queue(Turns(lambda: 6))
    for caller in (FLOOD, OTHER, THIRD):
        for _ in range(20):
            await queue.joins(caller.name, caller)
    assert queue.order == [FLOOD.name] * 6
    for _ in range(6):
        await queue.ends(FLOOD)
    assert sorted(queue.order[6:]) == sorted(2 * [OTHER.name, THIRD.name, FLOOD.name])
    for task in queue.tasks.values():
        task.cancel()


async def test_priority_counts_among_a_callers_own_and_starves_none() -> None:
    queue = Queue(Turns(lambda: 1))
    await queue.joins("runs", FLOOD)
    await queue.joins("patient", FLOOD, priority=5)
    for number in range(MAX_PASSED + 6):
        await queue.joins(f"urgent {number}", FLOOD, priority=-1)
    for _ in range(MAX_PASSED + 1):
        await queue.ends(FLOOD)
    assert queue.order[1] == "urgent 0" and queue.order[MAX_PASSED + 1] == "patient"
    for task in queue.tasks.values():
        task.cancel()


async def test_more_room_is_used_once_it_is_heard_of_and_none_is_as_much_as_before() -> None:
    room = [0]
    queue = Queue(Turns(lambda: room[0], at_first=2))
    for number in range(6):
        await queue.joins(str(number), FLOOD)
    assert len(queue.order) == 2
    for room[0], wanted in ((4, 4), (0, 4), (5, 5)):
        queue.turns.grant()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(queue.order) == wanted, room
    for task in queue.tasks.values():
        task.cancel()


async def test_who_leaves_while_waiting_or_in_the_moment_of_its_turn_takes_nothing_along() -> None:
    turns = Turns(lambda: 1)
    queue = Queue(turns)
    for name in ("runs", "leaves", "leaves too late", "stays"):
        await queue.joins(name, FLOOD)
    queue.tasks["leaves"].cancel()
    await asyncio.sleep(0)
    turns.give_back(FLOOD)
    queue.tasks["leaves too late"].cancel()  # its turn has come, and it has not heard of it
    for _ in range(4):
        await asyncio.sleep(0)
    assert queue.order == ["runs", "stays"] and turns.waiting == 0
    turns.give_back(FLOOD)
    assert turns._total == 0 and not turns._running and not turns._lines and not turns._last_turn


async def test_the_longest_wait_is_that_of_the_first_who_still_waits() -> None:
    now = [100.0]
    turns = Turns(lambda: 1, clock=lambda: now[0])
    queue = Queue(turns)
    assert turns.longest_wait_s() == 0.0
    for name, caller in (("runs", FLOOD), ("first", FLOOD), ("second", OTHER)):
        await queue.joins(name, caller)
        now[0] += 2.0
    assert (turns.waiting, turns.longest_wait_s()) == (2, 4.0)
    await queue.ends(FLOOD)
    assert turns.longest_wait_s() == 4.0, "the first is of the caller that has had a turn"
    for task in queue.tasks.values():
        task.cancel()


class FullCells(ScriptedCells):
    """Notes in which order requests reach the cells."""

    def __init__(self) -> None:
        super().__init__("a" * 40)
        self.pace_s = 0.001


async def test_behind_a_flood_of_500_another_callers_request_is_admitted_and_served_next() -> None:
    cells = FullCells()
    admission, at_once = Admission(capacity=64, slots=4), Turns(lambda: 4)
    service = Generation(served_model(ByteTokenizer()), cells, admission=admission, turns=at_once)
    refused = 0

    async def asks(caller: Caller, prompt: str) -> None:
        nonlocal refused
        checked = service.check(Ask(prompt, {"max_new_tokens": 40, "mode": "diffusion"}))
        try:
            with service.hold(caller=caller):
                await (await service.run(checked, Deadline.after(60), caller)).whole()
        except Overloaded as error:
            assert error.retry_after_s and error.retry_after_s >= 1
            refused += 1

    flood = [asyncio.create_task(asks(FLOOD, "f")) for _ in range(500)]
    while len(cells.requests) < 8:
        await asyncio.sleep(0)
    before = len(cells.requests)
    await asks(OTHER, "o")
    places = [place for place, request in enumerate(cells.requests) if len(request.prompt_token_ids) == 2]
    others = [place for place in places if cells.requests[place].prompt_token_ids == served_prompt("o")]
    assert others and others[0] - before <= 1, "at most one end of the flood came before it"
    await asyncio.gather(*flood)
    assert refused == 500 - 64 and admission.running == at_once.waiting == 0


def served_prompt(text: str) -> tuple[int, ...]:
    return tuple(ByteTokenizer().encode(text))


async def test_the_reserve_is_for_callers_below_their_share() -> None:
    door = Admission(capacity=16, slots=4)
    with ExitStack() as places:
        for _ in range(16):
            places.enter_context(door.hold(caller=FLOOD))
        with pytest.raises(Overloaded), door.hold(caller=FLOOD):
            pass
        places.enter_context(door.hold(caller=OTHER))
        places.enter_context(door.hold(caller=THIRD))
        with pytest.raises(Overloaded) as caught, door.hold(caller=Caller("a fourth")):
            pass
        assert caught.value.retry_after_s and door.running == door.most == 18
    assert door.running == 0 and not door._of_callers


async def test_a_request_waits_for_its_turn_longer_than_for_a_cell_and_no_longer_than_its_deadline() -> None:
    cells = FullCells()
    service = Generation(
        served_model(ByteTokenizer()), cells, patience=Patience(queue_timeout_s=0.02), turns=Turns(lambda: 1)
    )
    await service._means.turns.take(FLOOD)
    patient, hasty = [service.check(Ask("x", {"max_new_tokens": 4, "mode": "diffusion"})) for _ in range(2)]
    answer = asyncio.create_task((await service.run(patient, Deadline.after(60))).whole())
    with pytest.raises(DeadlineExceeded):
        await (await service.run(hasty, Deadline.after(0.08))).whole()
    assert not answer.done() and not cells.requests
    service._means.turns.give_back(FLOOD)
    assert (await answer).token_ids


async def test_while_no_cell_lives_those_that_wait_for_a_turn_do_not_wait_for_each_other() -> None:
    script = Script((1, 2, 3), [Stay(refuses=Unavailable("no cell can take this request"))])
    service = Generation(
        served_model(ByteTokenizer()), script, patience=Patience(queue_timeout_s=0.05), turns=Turns(lambda: 0)
    )
    asks = [service.check(Ask("x", {"max_new_tokens": 3, "mode": "diffusion"})) for _ in range(20)]
    runs = [await service.run(ask, Deadline.after(60)) for ask in asks]
    async with asyncio.timeout(0.9):  # one after the other: a second
        ends = await asyncio.gather(*(run.whole() for run in runs), return_exceptions=True)
    assert {type(end) for end in ends} == {Unavailable}


def _asked(service: Generation, mode: Mode) -> Checked:
    return service.check(Ask("x", {"max_new_tokens": 4, "mode": str(mode)}))


async def test_who_cannot_be_served_now_holds_up_nobody_who_can_be() -> None:
    """As while all cells lack a denoiser. Once one is there again, it has its turn behind the others."""
    cells, at_once = FullCells(), Turns(lambda: 1)
    cells.serves = {Mode.AR}
    service = Generation(served_model(ByteTokenizer()), cells, patience=Patience(3, 60.0), turns=at_once)
    waiting = [
        asyncio.create_task((await service.run(_asked(service, Mode.DIFFUSION), Deadline.after(60))).whole())
        for _ in range(5)
    ]
    while at_once.waiting or at_once._total:
        await asyncio.sleep(0.001)
    for _ in range(3):
        assert (await (await service.run(_asked(service, Mode.AR), Deadline.after(60))).whole()).token_ids
    assert not any(task.done() for task in waiting)
    cells.serves = set(Mode)
    async with asyncio.timeout(10):
        assert all(run.token_ids for run in await asyncio.gather(*waiting))
    assert at_once._total == 0 and not at_once._running


async def test_who_cannot_be_served_waits_no_longer_than_for_a_cell_and_ends_no_other() -> None:
    cells, at_once = FullCells(), Turns(lambda: 1)
    cells.serves = {Mode.AR}
    service = Generation(served_model(ByteTokenizer()), cells, patience=Patience(3, 0.05), turns=at_once)
    await at_once.take(FLOOD)
    runs = [await service.run(_asked(service, Mode.DIFFUSION), Deadline.after(60)) for _ in range(20)]
    ends = [asyncio.create_task(run.whole()) for run in runs]
    other = asyncio.create_task((await service.run(_asked(service, Mode.AR), Deadline.after(60))).whole())
    async with asyncio.timeout(0.9):  # one after the other: a second
        for end in await asyncio.gather(*ends, return_exceptions=True):
            assert isinstance(end, Unavailable)
            assert str(end) == "no cell took this request within 0.05 s: no cell serves its mode now"
    assert not other.done()
    at_once.give_back(FLOOD)
    assert (await other).token_ids


async def test_what_has_begun_has_its_turn_again_at_once() -> None:
    at_once, script = Turns(lambda: 1), Script(tokens("All good"), [Stay(1, GONE), WELL])
    service = Generation(served_model(ByteTokenizer()), script, patience=Patience(3, 60.0), turns=at_once)
    run = await service.run(_asked(service, Mode.DIFFUSION), Deadline.after(60))
    assert (await anext(run)).token_ids
    script.lacking = True
    rest = asyncio.create_task(run.whole())
    async with asyncio.timeout(10):
        await at_once.take(OTHER)  # while it waits
        script.lacking = False
        await rest
        assert run.token_ids == list(tokens("All good"))
    at_once.give_back(OTHER)
    assert at_once._total == 0 and not at_once._running and not at_once._last_turn


class Lines:
    """Cells of so many slots, which hold so many requests, of this router or of others."""

    def __init__(self, *slots: int, held: int = 0) -> None:
        self.sums = Sums(len(slots), sum(slots), held)


@pytest.mark.parametrize(
    ("slots", "queued", "wanted"), [((8,), 64, 10), ((8, 8), 64, 20), ((8,), 1, 9), ((8,), 0, 8), ((), 64, 16)]
)
async def test_cells_get_what_keeps_them_busy_and_a_few_more(slots: tuple[int, ...], queued: int, wanted: int) -> None:
    config = ServiceConfig.parse(
        {"cell": {"max_sequences": 8}, "cluster": {"min_cells": 2, "max_cells": 3, "max_queued_requests": queued}}
    )
    assert await _let_in(config, Lines(*slots)) == wanted


@pytest.mark.parametrize(
    ("held", "routers", "wanted"),
    [
        (0, 4, 20),  # nobody else asks
        (20, 4, 5),  # others have taken all: it has its part all the same
        (12, 4, 8),  # what is free
        (40, 4, 5),  # more than there should be
        (20, 1, 20),  # no other router: they are its own
        (20, 30, 1),  # more routers than places
    ],
)
async def test_a_router_has_its_part_and_what_others_leave(held: int, routers: int, wanted: int) -> None:
    """Else each of many routers fills all cells: what is too much waits where no new cell finds it, or is refused."""
    config = ServiceConfig.parse(
        {"cell": {"max_sequences": 8}, "cluster": {"max_queued_requests": 64, "num_routers": routers}}
    )
    assert await _let_in(config, Lines(8, 8, held=held)) == wanted


async def _let_in(config: ServiceConfig, lines: Lines) -> int:
    """Of forty."""
    at_once = turns(config, lines)  # type: ignore[arg-type]
    queue = Queue(at_once)
    for number in range(40):
        await queue.joins(str(number), NOBODY)
    found = len(queue.order)
    for task in queue.tasks.values():
        task.cancel()
    return found


class Context:
    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> None:
        """Some clients send none."""


@pytest.mark.parametrize(
    ("peer", "wanted"),
    [("ipv4:127.0.0.1:4711", "127.0.0.1"), ("ipv6:[::1]:4711", "::1"), ("unix:/tmp/x", ""), ("", "")],
)
def test_a_grpc_caller_is_its_address_without_the_port(peer: str, wanted: str) -> None:
    assert caller_of(generation(ScriptedCells()), Context(peer)) == Caller(wanted)
