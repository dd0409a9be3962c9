"""A router's way to a cell and back without Ray: a handle that calls the cell in this process, real lines."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster import cell
from cluster.cell import KNOWN, Cell
from cluster.config import ServiceConfig
from cluster.router import turns
from cluster.runs import kept
from cluster.runs.cell_lines import CellLine, CellLines, Sums
from cluster.runs.cells import Unfit
from cluster.runs.deadline import Deadline
from cluster.runs.messages import Beat, Placed, Wishes
from cluster.runs.record import Record
from cluster.runs.remote_cells import RemoteCells
from cluster.runs.routing import ElsewhereFirst
from cluster.runs.run import Generating, Means, Scoring
from tests.cluster.fakes import FINGERPRINT
from tests.cluster.test_cell import RunningFake, ScriptedEngine, started
from twotower.core import DecodingParams, FailureEvent, Mode, Request, RequestId, ScoreEvent, ScoreRequest
from twotower.errors import DeadlineExceeded, NumericalError, Overloaded, Unavailable
from twotower.text.answer_text import AnswerText
from twotower.transport.handshake import Address

_OUTER = ContextVar("outer", default="")  # as Serve's own, in which it keeps an HTTP request's id


class LocalHandle:
    """As much of a DeploymentHandle as a router uses. A task is awaited and cancelled like a DeploymentResponse.

    Calls go to the first cell that their last argument does not name, as `ElsewhereFirst` has it.
    """

    def __init__(self, cells: Sequence[Cell], method: str = "") -> None:
        self._cells, self._method = cells, method

    def _init(self, **_: object) -> None:
        """Nothing to set up."""

    def options(self, method_name: str, **_: object) -> "LocalHandle":
        return LocalHandle(self._cells, method_name)

    def remote(self, *args: Any) -> asyncio.Task[Any]:
        assert _OUTER.get() == "", "Serve takes two calls of one context for the same"
        cell = next((cell for cell in self._cells if cell.name not in args[-1].avoid), self._cells[0])
        return asyncio.create_task(getattr(cell, self._method)(*args))


@asynccontextmanager
async def _joined() -> AsyncIterator[tuple[RemoteCells, ScriptedEngine, Cell]]:
    engine, events = ScriptedEngine(), CellLines()
    cell = await started(RunningFake(engine, max_queued=0))
    await events.start("127.0.0.1")
    handle: Any = LocalHandle([cell])
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
        _OUTER.set("a request")
        attempt = await cells.place(Request(RequestId("r"), (1, 2)), 5.0, set())
        assert (attempt.cell, attempt.fingerprint) == ("cell", FINGERPRINT)
        _OUTER.set("")
        assert [(await attempt.next()).token_ids for _ in range(2)] == [(1, 2), (3,)]
        await attempt.close()
        await _all_free(cell)
        assert await _scores(cells, "s") == ScoreEvent(RequestId("s"), (-0.5,), (True,), 1.0)
        await _all_free(cell)
        assert await cells.served() and engine.cancelled == []


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


async def test_a_call_that_the_cell_lets_go_of_is_no_client_that_has_left() -> None:
    """As when Serve ends a cell's calls with it. The run goes on."""
    async with _joined() as (cells, _, cell):
        attempt = await cells.place(Request(RequestId("r"), (1, 2)), 5.0, set())
        await attempt.next()
        serves: Any = attempt._response
        serves.cancel()
        with pytest.raises(Unavailable, match="the cell has dropped this request"):
            await attempt.next()
        await attempt.close()
        await _all_free(cell)


async def test_a_cell_without_its_denoiser_is_no_other_for_what_needs_one() -> None:
    """One that is full is left for it otherwise, and not asked again while it refuses."""
    events, lacking = CellLines(), RunningFake(ScriptedEngine())
    pair = [await started(RunningFake(ScriptedEngine()), "a"), await started(lacking, "b")]
    lacking.pair.lost[0] = Unavailable("killed")
    await events.start("127.0.0.1")
    handle: Any = LocalHandle(pair)
    cells = RemoteCells(handle, events)
    needs, alone = (Request(RequestId("r"), (1, 2), DecodingParams(mode)) for mode in (Mode.DIFFUSION, Mode.AR))
    while events.living() != {"a", "b"}:
        await cells.served()
        await asyncio.sleep(0.01)
    assert cells.elsewhere(alone, {"a"}) and not cells.elsewhere(needs, {"a"}) and not cells.lacks(needs)
    await pair[0].shutdown()
    while events.living() != {"b"}:
        await asyncio.sleep(0.001)
    assert cells.lacks(needs) and not cells.lacks(alone) and await cells.served() == {Mode.AR}
    await pair[1].shutdown()
    while events.living():
        await asyncio.sleep(0.001)
    assert not cells.lacks(needs), "none lives"
    events.stop()


async def test_a_run_goes_on_on_the_other_cell_and_readiness_knows() -> None:
    engines, events = [ScriptedEngine(), ScriptedEngine()], CellLines()
    pair = [await started(RunningFake(engine), name) for engine, name in zip(engines, "ab", strict=True)]
    await events.start("127.0.0.1")
    handle: Any = LocalHandle(pair)
    cells = RemoteCells(handle, events)
    for _ in range(3):
        assert await cells.served()
        await asyncio.sleep(0.01)
    assert events.living() == {"a", "b"}, "one after the other is met"
    asked = Request(RequestId("r"), (1, 2), DecodingParams(Mode.AR))
    assert cells.elsewhere(asked, {"a"}) and not cells.elsewhere(asked, {"a", "b"})
    async with asyncio.timeout(5):
        run = Generating(
            Record(Request(RequestId("r"), (1, 2), DecodingParams(Mode.AR)), FINGERPRINT),
            Deadline.after(60), Means(cells), AnswerText(None),
        )  # fmt: skip
        assert (await anext(run)).token_ids == (1, 2)
        engines[1].go.set()
        await pair[0].shutdown()
        assert (await run.whole()).token_ids == [1, 2, 3]
        assert run.record.attempts == ["a", "b"] and run.usage.num_steps == 4
        while events.living() != {"b"}:
            await asyncio.sleep(0.001)
        assert await cells.served()
        await pair[1].shutdown()
        while events.living():
            await asyncio.sleep(0.001)
        assert not await cells.served()
    events.stop()


async def test_a_cell_that_would_leave_a_parameter_out_in_silence_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of the version before `min_p`, which says nothing of what it knows."""
    engine, events = ScriptedEngine(), CellLines()
    engine.go.set()
    await events.start("127.0.0.1")
    handle: Any = LocalHandle([await started(RunningFake(engine), "old")])
    cells = RemoteCells(handle, events)
    plain, asking = DecodingParams(Mode.AR, top_k=3, seed=5), DecodingParams(Mode.AR, min_p=0.5, min_tokens=1)
    async with asyncio.timeout(5):
        for known, params in ((KNOWN, plain), (KNOWN, asking), ((), plain)):
            monkeypatch.setattr(cell, "KNOWN", known)
            attempt = await cells.place(Request(RequestId("r"), (1, 2), params), 60, set())
            await attempt.close()
        wanted = "cell old is of an older version, which does not know min_p, min_tokens"
        with pytest.raises(Unfit, match=wanted) as refused:
            await cells.place(Request(RequestId("r"), (1, 2), asking), 60, set())
        assert refused.value.cell == "old"
    events.stop()


async def test_serve_asks_cells_with_room_first_and_one_to_avoid_last_and_anew() -> None:
    forgotten = list[Any]()
    router = ElsewhereFirst.__new__(ElsewhereFirst)
    router.on_replica_actor_unavailable = forgotten.append  # type: ignore[method-assign]
    router._get_curr_time_s = lambda: 0.0
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in "abc"]
    for avoided, full, wanted in (
        ("", "", ["abc"]),
        ("b", "", ["ac", "b"]),
        ("abc", "", ["abc"]),
        ("", "a", ["bc", "a"]),
        ("", "abc", ["abc"]),
        ("a", "ab", ["c", "b", "a"]),
        ("a", "bc", ["bc", "a"]),
    ):
        forgotten.clear()
        request: Any = SimpleNamespace(args=["request", 1.0, Wishes(frozenset(avoided) | {"gone"}, frozenset(full))])
        ranks = await router.choose_replicas(replicas, request)  # type: ignore[arg-type]
        assert ["".join(sorted(r.replica_id.unique_id for r in rank)) for rank in ranks] == wanted
        assert sorted(r.unique_id for r in forgotten) == [name for name in "abc" if name in avoided]
    bare: Any = SimpleNamespace(args=[])
    assert [len(rank) for rank in await router.choose_replicas(replicas, bare)] == [3]  # type: ignore[arg-type]


async def test_a_cell_is_full_by_its_last_beat_and_by_what_this_router_has_begun_and_ended_since() -> None:
    """Both routers count: the beat has the calls of all, and those that come after it are our own."""
    lines = CellLines()
    lines.address = Address("127.0.0.1", 1, "token")
    connection: Any = None
    busy, idle = CellLine(lines, connection), CellLine(lines, connection)
    lines._lines = {busy, idle}
    assert lines.full() == set(), "of a cell that has said nothing nothing is known"
    idle.take(Beat("idle", FINGERPRINT, (Mode.AR,), 0, 0, 4))
    for running, waiting, full in ((2, 0, False), (4, 0, True), (2, 2, True), (3, 0, False)):
        busy.take(Beat("busy", FINGERPRINT, (Mode.AR,), running, waiting, 4))
        assert lines.full() == ({"busy"} if full else set())
    calls = [lines.open(False) for _ in range(2)]
    for call in calls:
        busy.take(Placed(call.reply_to.call, "busy", FINGERPRINT))
    assert lines.full() == {"busy"}
    lines.close(calls[0])
    assert lines.full() == {"busy"}, "four of four"
    lines.close(calls[1])
    lines.close(calls[1])
    assert lines.full() == set()
    busy.take(Beat("busy", FINGERPRINT, (Mode.AR,), 4, 0, 4))
    assert lines.full() == {"busy"} and busy.calls == 0


async def test_sums_over_cells_are_those_of_their_beats_and_of_the_calls_since() -> None:
    """Kept by differences, so what comes late or twice must not count."""
    lines = CellLines()
    lines.address = Address("127.0.0.1", 1, "token")
    connection: Any = None
    one, other = CellLine(lines, connection), CellLine(lines, connection)
    lines._lines = {one, other}
    assert lines.sums == Sums()
    one.take(Beat("one", FINGERPRINT, (Mode.AR,), 2, 1, 4))
    other.take(Beat("other", FINGERPRINT, (), 1, 0, 4))
    assert lines.sums == Sums(1, 4, 3, 0), "one that serves nothing now does not count"
    calls = [lines.open(False) for _ in range(2)]
    for call in calls:
        one.take(Placed(call.reply_to.call, "one", FINGERPRINT))
    assert lines.sums == Sums(1, 4, 5, 2)
    one.take(Beat("one", FINGERPRINT, (Mode.AR,), 4, 0, 4))
    other.take(Beat("other", FINGERPRINT, (Mode.AR,), 1, 0, 8))
    assert lines.sums == Sums(2, 12, 5, 2)
    lines.close(calls[0])
    lines.close(calls[0])
    assert lines.sums == Sums(2, 12, 4, 1)
    lines.lose(one, FailureEvent(RequestId("*"), Unavailable("gone")))
    one.take(Beat("one", FINGERPRINT, (Mode.AR,), 4, 0, 4))
    lines.close(calls[1])
    assert lines.sums == Sums(1, 8, 1, 0), "and one that is lost has nothing more to say"


async def test_a_late_cell_counts_so_that_the_others_stay_busy() -> None:
    """Its requests have turns that they keep. Without its places, those would be taken off the other cell."""
    lines = CellLines()
    lines.address = Address("127.0.0.1", 1, "token")
    late, other = (CellLine(lines, cast(Any, SimpleNamespace(is_late=is_late))) for is_late in (True, False))
    lines._lines = {late, other}
    for line, name in ((late, "late"), (other, "other")):
        line.take(Beat(name, FINGERPRINT, (Mode.AR,), 0, 0, 4))
    at_once = turns(ServiceConfig.parse({"cell": {"max_sequences": 4}, "cluster": {"max_queued_requests": 0}}), lines)
    calls = [lines.open(False) for _ in range(8)]
    for line, call in zip([late] * 4 + [other] * 4, calls, strict=True):
        async with asyncio.timeout(1):
            await at_once.take()
        line.take(Placed(call.reply_to.call, "cell", FINGERPRINT))
    ninth = asyncio.create_task(at_once.take())
    await asyncio.sleep(0)
    assert not ninth.done() and lines.load() == {"other": 4}
    lines.close(calls[-1])
    at_once.give_back()
    async with asyncio.timeout(1):
        await ninth


async def test_no_cell_is_sought_where_all_that_serve_keeps_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve asks each cell that a call avoids for its queue, and this one avoids all that are met."""
    async with _joined() as (cells, _, _cell):
        monkeypatch.setattr(kept, "cells", frozenset({"cell", "new"}))
        assert await cells.served()
        for known, asks in ((frozenset({"cell", "new"}), True), (frozenset({"cell"}), False)):
            monkeypatch.setattr(kept, "cells", known)
            cells._meeting = None
            assert await cells.served() and (cells._meeting is not None) == asks
