"""A router's way to a cell and back without Ray: a handle that calls the cell in this process, real event lines."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.cell import Cell
from cluster.deadline import Deadline
from cluster.event_lines import EventServer
from cluster.remote_cells import RemoteCells
from cluster.runs.record import Record
from cluster.runs.run import Means, Scoring
from tests.cluster.fakes import FINGERPRINT
from tests.cluster.test_cell import RunningFake, ScriptedEngine, started
from twotower.core import Request, RequestId, ScoreEvent, ScoreRequest
from twotower.errors import DeadlineExceeded, NumericalError, Overloaded


class LocalHandle:
    """As much of a DeploymentHandle as a router uses. A task is awaited and cancelled like a DeploymentResponse."""

    def __init__(self, cell: Cell, method: str = "") -> None:
        self._cell, self._method = cell, method

    def _init(self, **_: object) -> None:
        """Nothing to set up."""

    def options(self, method_name: str, **_: object) -> "LocalHandle":
        return LocalHandle(self._cell, method_name)

    def remote(self, *args: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(getattr(self._cell, self._method)(*args))


@asynccontextmanager
async def _joined() -> AsyncIterator[tuple[RemoteCells, ScriptedEngine, Cell]]:
    engine, events = ScriptedEngine(), EventServer()
    cell = await started(RunningFake(engine, max_queued=0))
    await events.start("127.0.0.1")
    handle: Any = LocalHandle(cell)
    try:
        yield RemoteCells(handle, events), engine, cell
    finally:
        await cell.shutdown()
        events.stop()


async def _scores(cells: RemoteCells, name: str, timeout_s: float = 5.0) -> ScoreEvent:
    record = Record(ScoreRequest(RequestId(name), (1, 2, 3), 2), FINGERPRINT)
    return await Scoring(record, Deadline.after(timeout_s), Means(cells)).whole()


async def _all_free(cell: Cell) -> None:
    async with asyncio.timeout(2):
        while (await cell.stats()).running:
            await asyncio.sleep(0.001)


async def test_tokens_and_scores_come_back() -> None:
    async with _joined() as (cells, engine, cell):
        engine.go.set()
        attempt = await cells.place(Request(RequestId("r"), (1, 2)), 5.0, set())
        assert (attempt.cell, attempt.fingerprint) == ("cell", FINGERPRINT)
        assert [(await attempt.next()).token_ids for _ in range(2)] == [(1, 2), (3,)]
        await attempt.close()
        await _all_free(cell)
        assert await _scores(cells, "s") == ScoreEvent(RequestId("s"), (-0.5,), (True,), 1.0)
        await _all_free(cell)
        assert await cells.ready() and engine.cancelled == []


async def test_errors_are_raised() -> None:
    async with _joined() as (cells, engine, cell):
        first = asyncio.create_task(_scores(cells, "first"))
        while not (await cell.stats()).running:
            await asyncio.sleep(0.001)
        with pytest.raises(Overloaded):
            await _scores(cells, "second")
        engine.error = NumericalError("NaN")
        engine.go.set()
        with pytest.raises(NumericalError, match="NaN"):
            await first


@pytest.mark.parametrize("way", ["cancel", "deadline"])
async def test_whoever_leaves_frees_the_sequence(way: str) -> None:
    async with _joined() as (cells, engine, cell):
        scoring = asyncio.create_task(_scores(cells, "s", 0.05 if way == "deadline" else 5.0))
        while not (await cell.stats()).running:
            await asyncio.sleep(0.001)
        if way == "cancel":
            scoring.cancel()
        [outcome] = await asyncio.gather(scoring, return_exceptions=True)
        assert isinstance(outcome, DeadlineExceeded if way == "deadline" else asyncio.CancelledError)
        await _all_free(cell)
        assert set(engine.cancelled) == {"s"}, "by the reader, the deadline or both"
