"""A cell without Ray: a real pair over a scripted engine; and what a router makes of Ray's errors."""

import asyncio
from collections.abc import Sequence, Set
from typing import Any

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from actors.settings import CellSettings
from cluster.cell import Cell
from cluster.readiness import Readiness
from cluster.runs.cell_lines import CellLines
from cluster.runs.messages import Beat
from cluster.runs.remote_cells import plain_error
from cluster.runs.streams import merged
from tests.cluster.fakes import FINGERPRINT, VOCABULARY, ScriptedCells
from twotower.core import (
    AnyRequest,
    BlockEvent,
    Event,
    FailureEvent,
    FinishReason,
    Mode,
    ReleasedEvent,
    Request,
    RequestId,
    ScoreEvent,
    ScoreRequest,
)
from twotower.engine.handle import EngineStats
from twotower.engine.inbox import Inbox
from twotower.engine.ledger import Ledger, Room
from twotower.engine.pair import Pair
from twotower.errors import Cancelled, NumericalError, Overloaded, TwoTowerError, Unavailable


class ScriptedEngine:
    """Answers each request with two blocks, or its scores; holds back the last of it until `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.happened: asyncio.Queue[Event] = asyncio.Queue()
        self.cancelled: list[RequestId] = []
        self.error: Exception | None = None
        self.finishing: list[asyncio.Task[None]] = []

    def add(self, requests: Sequence[AnyRequest]) -> None:
        for request in requests:
            if isinstance(request, Request) and not request.committed:
                self.happened.put_nowait(BlockEvent(request.id, 0, (1, 2), 3, 1))
            self.finishing.append(asyncio.create_task(self._finish(request)))

    async def _finish(self, request: AnyRequest) -> None:
        await self.go.wait()
        if self.error is not None:
            self.happened.put_nowait(FailureEvent(request.id, NumericalError("NaN")))
        elif isinstance(request, ScoreRequest):
            self.happened.put_nowait(ScoreEvent(request.id, (-0.5,), (True,), 1.0))
        else:
            self.happened.put_nowait(BlockEvent(request.id, 2, (3,), 1, 1, FinishReason.STOP))
        self.happened.put_nowait(ReleasedEvent(request.id))

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        self.cancelled.extend(request_ids)
        for request_id in request_ids:
            self.happened.put_nowait(ReleasedEvent(request_id))

    async def events(self) -> list[Event]:
        return [await self.happened.get()]

    async def stats(self) -> list[EngineStats]:
        return [EngineStats("context")]


class RunningFake:
    """What `start_pair` gives, without processes."""

    def __init__(self, engine: ScriptedEngine, max_queued: int = 1, slots: int = 1) -> None:
        self.pair = Pair(engine, [engine], Ledger(Room(slots, 100), [], max_queued))
        self.homes = [{"pid": "1"}]
        self.fingerprint, self.vocabulary = FINGERPRINT, VOCABULARY
        self.mended, self.mending_s = 0, 0.0
        self.closed = False

    def failure(self) -> str | None:
        return None if self.pair.failure is None else str(self.pair.failure)

    def why_not(self, request: AnyRequest) -> str | None:
        error = self.pair.why_not(request)
        return None if error is None else str(error)

    def served(self) -> tuple[Mode, ...]:
        return tuple(mode for mode in Mode if self.pair.serves(mode))

    async def stats(self) -> list[EngineStats]:
        return [EngineStats("context")]

    async def close(self) -> None:
        await self.pair.close()
        self.closed = True


async def started(running: RunningFake, name: str = "cell") -> Cell:
    async def start(settings: CellSettings) -> RunningFake:
        running.pair.start()
        return running

    cell = Cell.__new__(Cell)
    await cell.__init__(CellSettings("x", device="cpu"), start, name)  # type: ignore[misc]
    return cell


def request(name: str) -> Request:
    return Request(RequestId(name), (1, 2, 3))


async def collect(cell: Cell, name: str) -> list[Any]:
    return [event async for event in cell.events(request(name), 5.0)]


async def test_events_come_through_and_room_is_given_back() -> None:
    engine = ScriptedEngine()
    cell = await started(RunningFake(engine))
    engine.go.set()
    events = await collect(cell, "a")
    assert [event.token_ids for event in events] == [(1, 2), (3,)]
    await asyncio.sleep(0)
    stats = await cell.stats()
    assert (stats.running, stats.waiting, stats.homes) == (0, 0, ({"pid": "1"},))
    beat = cell._beat()
    assert beat == Beat("cell", FINGERPRINT, tuple(Mode), 0, 0, 1, beat.sign)
    assert beat.sign is not None and [tower.name for tower in beat.sign.towers] == ["context", "denoiser"]
    await cell.shutdown()


async def test_errors_are_the_last_event() -> None:
    engine = ScriptedEngine()
    cell = await started(RunningFake(engine, max_queued=0))
    first = asyncio.create_task(collect(cell, "a"))
    await asyncio.sleep(0.01)
    [refused] = await collect(cell, "b")
    assert isinstance(refused, FailureEvent) and isinstance(refused.error, Overloaded)
    engine.error = NumericalError("NaN")
    engine.go.set()
    assert isinstance((await first)[-1].error, NumericalError)
    await cell.shutdown()


async def test_scoring_is_one_event_or_an_error_and_frees_its_place() -> None:
    engine = ScriptedEngine()
    cell = await started(RunningFake(engine))
    asked = [ScoreRequest(RequestId(name), (1, 2, 3), 2) for name in ("left", "well", "ill")]
    left = asyncio.ensure_future(anext(cell.events(asked[0], 5.0)))
    await asyncio.sleep(0.01)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert engine.cancelled == ["left"] and (await cell.stats()).running == 0
    engine.go.set()
    [scores] = [event async for event in cell.events(asked[1], 5.0)]
    assert scores == ScoreEvent(RequestId("well"), (-0.5,), (True,), 1.0)
    await asyncio.sleep(0.01)
    engine.error = NumericalError("NaN")
    [failed] = [event async for event in cell.events(asked[2], 5.0)]
    assert isinstance(failed, FailureEvent) and isinstance(failed.error, NumericalError)
    await cell.shutdown()


async def test_a_reader_that_leaves_frees_the_sequence() -> None:
    engine = ScriptedEngine()
    cell = await started(RunningFake(engine))
    for way in ("close", "cancel"):
        events = cell.events(request(way), 5.0)
        await anext(events)
        if way == "close":
            await events.aclose()
        else:
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert way in engine.cancelled and (await cell.stats()).running == 0
    await cell.shutdown()


async def test_a_router_that_is_gone_frees_its_sequences_at_once() -> None:
    """Those of another router go on, and a cancel that comes from elsewhere is one."""
    engine = ScriptedEngine()
    cell = await started(RunningFake(engine, slots=3))
    routers = [CellLines(), CellLines()]
    calls = []
    async with asyncio.timeout(5):
        for number, router in enumerate([*routers, routers[1]]):
            if number < 2:
                await router.start("127.0.0.1")
            call = router.open(merging=False)
            calls.append(asyncio.ensure_future(cell.run(request(f"r{number}"), 60.0, call.reply_to)))
            assert (await call.inbox.get()).token_ids == (1, 2)
        routers[0].stop()
        with pytest.raises(Unavailable, match="the router that asked is gone"):
            await calls[0]
        calls[2].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[2]
        await asyncio.sleep(0.01)
        assert engine.cancelled == ["r0", "r2"] and (await cell.stats()).running == 1
        engine.go.set()
        await calls[1]
    routers[1].stop()
    await cell.shutdown()


async def _routed(cell: Cell, router: CellLines, name: str) -> tuple[asyncio.Task[None], Inbox]:
    call = router.open(merging=False)
    return asyncio.create_task(cell.run(request(name), 60.0, call.reply_to)), call.inbox


async def test_a_router_that_is_gone_frees_its_place_in_the_queue() -> None:
    cell, router = await started(RunningFake(ScriptedEngine())), CellLines()
    await router.start("127.0.0.1")
    async with asyncio.timeout(5):
        (running, inbox), (waiting, _) = [await _routed(cell, router, name) for name in ("runs", "waits")]
        await inbox.get()
        while (await cell.stats()).waiting == 0:
            await asyncio.sleep(0.01)
        router.stop()
        for call in (running, waiting):
            with pytest.raises(Unavailable, match="the router that asked is gone"):
                await call
        await asyncio.sleep(0.01)
        stats = await cell.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    await cell.shutdown()


async def test_what_runs_when_a_cell_is_shut_down_is_told_so() -> None:
    cell, router = await started(RunningFake(ScriptedEngine())), CellLines()
    await router.start("127.0.0.1")
    async with asyncio.timeout(5):
        call, inbox = await _routed(cell, router, "runs")
        await inbox.get()
        await cell.shutdown()
        failure = await inbox.get()
        assert isinstance(failure, FailureEvent) and str(failure.error) == "the cell is shutting down"
        await call
    router.stop()


async def test_a_broken_pair_fails_its_health_check() -> None:
    running = RunningFake(ScriptedEngine())
    cell = await started(running)
    await cell.check_health()
    running.pair.failure = Unavailable("a tower is gone")
    with pytest.raises(RuntimeError, match="a tower is gone"):
        await cell.check_health()
    assert not cell._beat().modes
    await cell.shutdown()
    assert running.closed


def test_rays_errors_become_ours() -> None:
    ours = RayTaskError("f", "a long traceback", NumericalError("NaN"))
    assert isinstance(plain_error(ours), NumericalError) and str(plain_error(ours)) == "NaN"
    dual = ours.as_instanceof_cause()
    assert type(plain_error(dual)) is NumericalError
    theirs = RayTaskError("f", "a long traceback", ZeroDivisionError("x"))
    assert type(plain_error(theirs)) is TwoTowerError and "ZeroDivisionError" in str(plain_error(theirs))
    assert isinstance(plain_error(ActorDiedError()), Unavailable)
    assert isinstance(plain_error(BackPressureError(1, 1)), Overloaded)
    for code in (StatusCode.CANCELLED, StatusCode.INTERNAL):
        cut = AioRpcError(code, Metadata(), Metadata(), "Stream removed")
        assert type(plain_error(cut)) is Unavailable, "a server that stops cancels its calls"
    for cancelled in (RequestCancelledError("x"), TaskCancelledError()):
        assert isinstance(plain_error(cancelled), Cancelled)


async def test_merged_streams_end_together() -> None:
    cells = ScriptedCells()
    cells.pace_s = 0.001
    both = merged([cells.generate(request(name), 1.0) for name in ("a", "b")])
    assert {index for index, _ in [item async for item in both]} == {0, 1}
    cells.fail = lambda request, block: None if request.id == "a" else 1 / 0
    with pytest.raises(ZeroDivisionError):
        [item async for item in merged([cells.generate(request(name), 1.0) for name in ("a", "b")])]
    assert cells.open == 0


async def test_readiness_tells_of_changes_only() -> None:
    cells, told = ScriptedCells(), list[Set[Mode]]()

    async def note(served: Set[Mode]) -> None:
        told.append(served)

    readiness, alone = Readiness(cells, note), {Mode.AR}
    for served in (set[Mode](), set(Mode), set(Mode), alone, set(Mode), set[Mode]()):
        cells.serves = served
        await readiness.poll()
        assert readiness() == served
    assert told == [set(Mode), alone, set(Mode), set()]
