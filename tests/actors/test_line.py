"""The line between a cell and a tower process, both ends in this one: order, signs of life, and every way to end."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from actors.frames import LineAddress, connect, framed, new_token, read_frame, take_frames
from actors.line import NEWS, ORDERS, Add, Cancel, Ended, Score, TowerLine
from actors.remote import RemoteEngine
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
    ScoreEvent,
    ScoreRequest,
)
from twotower.engine.handle import EngineStats
from twotower.engine.runner import EngineRunner
from twotower.errors import FieldError, InvalidRequest, Unavailable
from twotower.wire import CodecError

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
        self.open_line = self
        self._line = line

    async def remote(self) -> LineAddress:
        return self._line.open()


@asynccontextmanager
async def _joined(stall_s: float = 60.0) -> AsyncIterator[tuple[RemoteEngine, ScriptedEngine, EngineRunner]]:
    runner = EngineRunner(stall_s)
    engine = ScriptedEngine(runner)
    runner.start([engine])
    remote = RemoteEngine(_Actor(TowerLine(runner, TIMEOUT_S)), "context tower", TIMEOUT_S)
    await remote.open_line()
    try:
        yield remote, engine, runner
    finally:
        engine.hang_s = 0.0
        await remote.close_line()
        runner.stop()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What comes before the other side hangs up, politely or not."""
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


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


async def test_scoring_goes_the_same_way() -> None:
    async with _joined() as (remote, engine, _):
        remote.add([_request("r"), _score_request("s")])
        events = await _until_events(remote, 4)
        assert engine.heard == [_request("r"), _score_request("s")]
        assert events[2:] == [_scores("s"), ReleasedEvent(RequestId("s"))]


@pytest.mark.slow
async def test_a_quiet_engine_shows_that_it_lives() -> None:
    async with _joined() as (remote, _, _):
        started = time.monotonic()
        for _ in range(6):
            assert await remote.events() == []
        assert time.monotonic() - started < 6 * TIMEOUT_S


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
            await _until_events(remote, 1)


@pytest.mark.slow
async def test_an_engine_that_hangs_in_a_tick_is_reported() -> None:
    async with _joined(stall_s=0.3) as (remote, engine, _):
        engine.hang_s = 1.5
        with pytest.raises(Unavailable, match=r"more than 0\.3 s"):
            await _until_events(remote, 1)


async def test_a_process_that_says_nothing_or_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = LineAddress("127.0.0.1", listener.getsockname()[1], new_token())

        class Mute(_Actor):
            async def remote(self) -> LineAddress:
                return address

        remote = RemoteEngine(Mute(TowerLine(EngineRunner(), TIMEOUT_S)), "denoiser tower", 0.3)
        await remote.open_line()
        with pytest.raises(Unavailable, match=r"denoiser tower process has said nothing for 0\.3 s"):
            await remote.events()
        sock, _ = listener.accept()
        sock.close()
        with pytest.raises(Unavailable, match="denoiser tower process is gone"):
            await remote.events()
        await remote.close_line()


async def test_who_does_not_know_the_token_is_not_heard() -> None:
    runner = EngineRunner()
    engine = ScriptedEngine(runner)
    runner.start([engine])
    address = TowerLine(runner, TIMEOUT_S).open()
    reader, writer = await connect(replace(address, token=new_token()), 1.0)
    writer.write(framed(ORDERS.encode([Add(_request("intruder"))])))
    assert not await rest(reader)
    writer.close()
    reader, writer = await connect(address, 1.0)
    writer.write(framed(ORDERS.encode([Add(_request("cell"))])))
    async with asyncio.timeout(5):
        while not (news := NEWS.decode(await read_frame(reader))):
            pass
    assert isinstance(news[0], BlockEvent) and news[0].request_id == "cell"
    assert [request.id for request in engine.heard] == ["cell"]
    writer.close()
    await writer.wait_closed()
    runner.stop()


def test_frames_come_out_however_the_bytes_were_cut() -> None:
    bodies = [b"", b"x", b"y" * 300]
    stream = b"".join(map(framed, bodies))
    for size in (1, 3, 7, len(stream)):
        received, taken = bytearray(), []
        for start in range(0, len(stream), size):
            received += stream[start : start + size]
            taken += list(take_frames(received))
        assert taken == bodies and not received
    with pytest.raises(ConnectionError, match="wanted at most"):
        list(take_frames(bytearray(b"\xff\xff\xff\xff")))


def test_messages_survive_and_others_are_refused() -> None:
    error = InvalidRequest([FieldError("seed", "got ✗")])
    orders = [Add(_request("a")), Cancel(RequestId("b")), Score(_score_request("c"))]
    assert ORDERS.decode(ORDERS.encode(orders)) == orders
    news = [BlockEvent(RequestId("a"), 16, (), 0, 1), FailureEvent(RequestId("b"), error), Ended("x"), _scores("c")]
    block, failure, ended, scores = NEWS.decode(NEWS.encode(news))
    assert (block, ended, scores) == (news[0], *news[2:])
    assert isinstance(failure, FailureEvent) and str(failure.error) == str(error)
    for wrong in (
        b"[]]",
        b"{}",
        b'[["Add",{}]]',
        b'[["BlockEvent",{}]]',
        b'[["Cancel",{"request_id":3}]]',
        b'[["Score",{"request":{"id":"c","token_ids":[4,5.0],"start":1,"priority":0}}]]',
        ORDERS.encode(orders).replace(b"0.5", b'"0.5"'),
        ORDERS.encode(orders).replace(b'"ar"', b'"best"'),
    ):
        with pytest.raises(CodecError):
            ORDERS.decode(wrong)
