"""The line between a cell and a tower process, both ends in this one: order, signs of life, and every way to end."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from actors.line import LINE, Cancel, Ended
from actors.remote import RemoteEngine
from actors.tower_line import TowerLine
from twotower.core import (
    AnyRequest,
    BlockEvent,
    DecodingParams,
    FailureEvent,
    FinishReason,
    Mode,
    ReleasedEvent,
    Request,
    RequestId,
    RoundEvent,
    ScoreEvent,
    ScoreRequest,
    StepEvent,
)
from twotower.engine.handle import EngineStats
from twotower.engine.runner import EngineRunner
from twotower.errors import InvalidRequest, TwoTowerError, Unavailable
from twotower.transport.connection import connect
from twotower.transport.handshake import Address

TIMEOUT_S = 1.0


def _request(name: str, mode: Mode = Mode.AR) -> Request:
    params = DecodingParams(mode=mode, temperature=0.5, seed=2**63 - 1, stop_token_ids=(7, 8))
    return Request(RequestId(name), (4, 5, 6), params)


def _score_request(name: str) -> ScoreRequest:
    return ScoreRequest(RequestId(name), (4, 5, 6), 1, -3)


def _scores(name: str) -> ScoreEvent:
    return ScoreEvent(RequestId(name), (-0.0, -12.34567928314209), (True, False), 0.5)


class ScriptedEngine:
    """Answers a request with one block, or its scores, and its release; notes what it heard, in order."""

    def __init__(self, runner: EngineRunner) -> None:
        self.runner, self.heard = runner, []  # type: ignore[var-annotated]
        self.waiting: list[Any] = []
        self.crash: Exception | None = None
        self.hang_s = 0.0

    def takes(self, request: AnyRequest) -> bool:
        return not request.needs_denoiser

    def add(self, request: AnyRequest) -> None:
        self.waiting.append(request)

    def cancel(self, request_id: RequestId) -> None:
        self.waiting.append(request_id)

    def tick(self) -> bool:
        time.sleep(self.hang_s)
        if self.crash is not None:
            raise self.crash
        worked = bool(self.waiting)
        while self.waiting:
            message = self.waiting.pop(0)
            self.heard.append(message)
            if isinstance(message, Request):
                self.runner.emit(BlockEvent(message.id, 0, (9, 9), 3, 1, FinishReason.STOP))
                self.runner.emit(ReleasedEvent(message.id))
            elif isinstance(message, ScoreRequest):
                self.runner.emit(_scores(message.id))
                self.runner.emit(ReleasedEvent(message.id))
        return worked

    def close(self) -> None:
        pass

    def stats(self, busy_s: float) -> EngineStats:
        return EngineStats("context")


class _Actor:
    """What Ray's handle of a tower process looks like from the cell."""

    def __init__(self, line: TowerLine) -> None:
        self.call = self
        self._line = line

    async def remote(self, method: str) -> Address:
        assert method == "open_line"
        return await self._line.open()


@asynccontextmanager
async def _joined(
    stall_s: float = 60.0, timeout_s: float = TIMEOUT_S
) -> AsyncIterator[tuple[Any, ScriptedEngine, EngineRunner]]:
    runner = EngineRunner(stall_s)
    engine = ScriptedEngine(runner)
    runner.start([engine])
    remote: Any = RemoteEngine(_Actor(tower := TowerLine(runner, timeout_s)), "context tower", timeout_s)
    remote.tower = tower
    await remote.open_line()
    try:
        yield remote, engine, runner
    finally:
        engine.hang_s = 0.0
        remote.close_line()
        await asyncio.sleep(0.01)  # both ends hang up
        runner.stop()


async def _until_events(remote: RemoteEngine, count: int) -> list[Any]:
    events: list[Any] = []
    while len(events) < count:
        events += await remote.events()
    return events


async def test_requests_arrive_whole_and_in_order_and_events_come_back() -> None:
    async with _joined() as (remote, engine, _):
        requests = [_request(f"r{number}") for number in range(50)]
        for request in requests:
            remote.add([request])
            remote.cancel([request.id])
        events = await _until_events(remote, 100)
        assert engine.heard == [message for request in requests for message in (request, request.id)]
        blocks = [event for event in events if isinstance(event, BlockEvent)]
        assert blocks == [BlockEvent(request.id, 0, (9, 9), 3, 1, FinishReason.STOP) for request in requests]


async def test_a_trace_goes_the_same_way() -> None:
    async with _joined() as (remote, _, runner):
        name = RequestId("r")
        step, verdict = StepEvent(name, 1, 2, 0, (1, 2), (5, 6), (0.25, 0.5)), RoundEvent(name, 1, (5, 6), 1, 7)
        for event in (step, verdict):
            runner.emit(event)
        runner.wake()
        assert await _until_events(remote, 2) == [step, verdict]


async def test_scoring_goes_the_same_way() -> None:
    async with _joined() as (remote, engine, _):
        remote.add([_request("r"), _score_request("s")])
        events = await _until_events(remote, 4)
        assert engine.heard == [_request("r"), _score_request("s")]
        assert events[2:] == [_scores("s"), ReleasedEvent(RequestId("s"))]


@pytest.mark.slow
async def test_a_quiet_engine_keeps_its_line() -> None:
    async with _joined() as (remote, _, _):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2 * TIMEOUT_S):
                await remote.events()
        remote.add([_request("after")])
        assert len(await _until_events(remote, 2)) == 2


async def test_a_request_that_no_engine_here_decodes_fails_alone() -> None:
    async with _joined() as (remote, _, _):
        remote.add([_request("block", Mode.DIFFUSION), _request("token")])
        events = await _until_events(remote, 4)
        failed = next(event for event in events if isinstance(event, FailureEvent))
        assert failed.request_id == "block" and isinstance(failed.error, Unavailable)
        assert ReleasedEvent(RequestId("block")) in events and ReleasedEvent(RequestId("token")) in events


async def test_a_crashed_engine_says_why_after_its_last_events() -> None:
    async with _joined() as (remote, engine, _):
        engine.crash = Unavailable("the device is on fire")
        remote.add([_request("a")])
        with pytest.raises(Unavailable, match="the device is on fire"):
            await _until_events(remote, 99)


@pytest.mark.slow
async def test_an_engine_that_hangs_in_a_tick_is_reported() -> None:
    async with _joined(stall_s=0.3) as (remote, engine, _):
        engine.hang_s = 1.5
        with pytest.raises(Unavailable, match=r"more than 0\.3 s"):
            await _until_events(remote, 1)


@pytest.mark.parametrize("end", ["closed", "silent"])
async def test_a_process_that_is_gone_or_says_nothing(end: str) -> None:
    async with _joined(timeout_s=0.3) as (remote, _, _), asyncio.timeout(5):
        line = remote.tower._line
        if end == "closed":
            line._transport.abort()
        else:
            line._timer.cancel()
        with pytest.raises(Unavailable, match=f"the context tower process .*{'gone' if end == 'closed' else 'silent'}"):
            await remote.events()
        with pytest.raises(Unavailable, match="the context tower process"):
            remote.add([_request("late")])


async def test_a_tower_has_one_cell() -> None:
    async with _joined() as (remote, engine, _), asyncio.timeout(5):
        with pytest.raises(Unavailable, match="cannot be reached"):
            await connect(remote.tower._listener.address, {}, LINE, remote, silence_s=TIMEOUT_S)
        with pytest.raises(Unavailable, match="before"):
            await remote.tower.open()
        remote.add([_request("cell")])
        await _until_events(remote, 2)
        assert [request.id for request in engine.heard] == ["cell"]


@pytest.mark.slow
async def test_what_is_too_large_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with _joined() as (remote, engine, runner), asyncio.timeout(5):
        monkeypatch.setattr("twotower.transport.connection.MOST_BYTES", 2000)
        large = Request(RequestId("b"), tuple(range(1000)))
        remote.add([_request("a"), large, _request("c")])
        events = await _until_events(remote, 6)
        assert [request.id for request in engine.heard] == ["a", "c"]
        failure = next(event for event in events if isinstance(event, FailureEvent))
        assert failure.request_id == "b" and isinstance(failure.error, InvalidRequest)
        assert ReleasedEvent(RequestId("b")) in events
        runner.emit(BlockEvent(RequestId("d"), 0, tuple(range(1000)), 1, 1, FinishReason.LENGTH))
        runner.emit(ReleasedEvent(RequestId("d")))
        failure, released = await _until_events(remote, 2)
        assert type(failure.error) is TwoTowerError and released == ReleasedEvent(RequestId("d"))


async def test_nonsense_from_either_end(caplog: pytest.LogCaptureFixture) -> None:
    for wrong in (ReleasedEvent(RequestId("a")), Ended("x")):
        async with _joined() as (remote, engine, _), asyncio.timeout(5):
            remote._line.post(wrong)
            with pytest.raises(Unavailable, match="the context tower process is gone"):
                await remote.events()
            assert not engine.heard and "wanted an instruction" in caplog.text
    async with _joined() as (remote, _, _), asyncio.timeout(5):
        remote.tower._line.post(Cancel(RequestId("a")))
        with pytest.raises(Unavailable, match="sent a Cancel, wanted an event"):
            await remote.events()
