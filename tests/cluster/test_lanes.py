"""Lanes: short pieces pass long ones, and a deadline ends the waiting for a lane."""

import asyncio
import gc
import threading
import weakref
from functools import partial

import pytest

from cluster.runs.deadline import Deadline
from cluster.runs.generation import Ask
from cluster.runs.lanes import INLINE_S, MAX_PIECES, SHORT_S, Lane, Lanes
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, generation
from twotower.errors import DeadlineExceeded, Overloaded

LONG_S = 2 * SHORT_S


async def test_a_short_piece_does_not_wait_behind_a_long_one() -> None:
    lanes, go_on, deadline = Lanes(), threading.Event(), Deadline.after(60)
    long = [asyncio.create_task(lanes.run(LONG_S, go_on.wait, deadline)) for _ in range(3)]
    await asyncio.sleep(0.01)
    name = await lanes.run(SHORT_S, lambda: threading.current_thread().name, deadline)
    inline = await lanes.run(INLINE_S, threading.current_thread, deadline)
    assert name.startswith("short-lane") and inline is threading.main_thread()
    assert not any(task.done() for task in long)
    go_on.set()
    assert await asyncio.gather(*long) == [True] * 3


async def test_what_waits_past_its_deadline_is_left_out() -> None:
    lanes, go_on, done = Lanes(), threading.Event(), list[str]()
    first = asyncio.create_task(lanes.run(LONG_S, go_on.wait, Deadline.after(60)))
    await asyncio.sleep(0.01)
    with pytest.raises(DeadlineExceeded, match=r"not finished within 0\.05 s"):
        await lanes.run(LONG_S, lambda: done.append("late"), Deadline.after(0.05))
    go_on.set()
    await first
    await lanes.run(LONG_S, lambda: done.append("next"), Deadline.after(60))
    assert done == ["next"]


async def blocked(lane: Lane, go_on: threading.Event) -> "asyncio.Task[bool]":
    """The lane's thread is at this piece until `go_on`."""
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def work() -> bool:
        loop.call_soon_threadsafe(begun.set)
        return go_on.wait(60)

    task = asyncio.create_task(lane.run(work))
    await begun.wait()
    return task


async def test_a_lane_has_so_many_pieces_and_one_more_is_refused() -> None:
    lane, go_on = Lane("lane"), threading.Event()
    first = await blocked(lane, go_on)
    rest = [asyncio.create_task(lane.run(partial(int, place))) for place in range(MAX_PIECES - 1)]
    await asyncio.sleep(0)
    assert lane.pieces == MAX_PIECES
    with pytest.raises(Overloaded, match=r"256 pieces of work are in the lane, wanted fewer than 256"):
        await lane.run(int)
    assert lane.pieces == MAX_PIECES
    rest.pop().cancel()
    await asyncio.sleep(0)
    rest.append(asyncio.create_task(lane.run(int)))  # there is a place again
    go_on.set()
    assert await first and len(await asyncio.gather(*rest)) == MAX_PIECES - 1
    assert lane.pieces == 0


class Body:
    """Something whose end can be seen."""


async def test_a_waiting_piece_that_is_given_up_lets_go_of_what_it_holds_at_once() -> None:
    lane, go_on = Lane("lane"), threading.Event()
    first = await blocked(lane, go_on)
    body = Body()
    gone = weakref.ref(body)
    waiting = asyncio.create_task(lane.run(partial(id, body)))
    del body
    await asyncio.sleep(0)
    assert gone() is not None and lane.pieces == 2
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    del waiting
    await asyncio.sleep(0)  # until nothing has the error, and its frames, any more
    gc.collect()
    assert gone() is None and lane.pieces == 1 and not first.done()
    go_on.set()
    assert await first


async def test_an_error_of_a_piece_is_its_callers_and_counts_no_longer() -> None:
    lane = Lane("lane")
    with pytest.raises(ValueError, match="invalid literal"):
        await lane.run(partial(int, "x"))
    assert lane.pieces == 0 and await lane.run(partial(int, "7")) == 7


async def test_the_deadline_covers_tokenization(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, cells = threading.Event(), ScriptedCells()
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: [go_on.wait(), 5][1:])
    monkeypatch.setattr("cluster.runs.prompts.TOKENIZED_S", 1.0)
    with pytest.raises(DeadlineExceeded, match=r"not finished within 0\.05 s"):
        service = generation(cells)
        await service.run(service.check(Ask("some words")), Deadline.after(0.05))
    go_on.set()
    assert cells.requests == []
