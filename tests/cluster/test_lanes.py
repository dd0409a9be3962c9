"""Lanes: short pieces pass long ones, and a deadline ends the waiting for a lane."""

import asyncio
import threading

import pytest

from cluster.deadline import Deadline
from cluster.generation import Ask
from cluster.lanes import INLINE_S, SHORT_S, Lanes
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, generation
from twotower.errors import DeadlineExceeded

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


async def test_the_deadline_covers_tokenization(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, cells = threading.Event(), ScriptedCells()
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: [go_on.wait(), 5][1:])
    monkeypatch.setattr("cluster.generation._TOKENIZED_S", 1.0)
    with pytest.raises(DeadlineExceeded, match=r"not finished within 0\.05 s"):
        await generation(cells).run(Ask("some words"), Deadline.after(0.05))
    go_on.set()
    assert cells.requests == []
