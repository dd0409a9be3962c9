"""Events from cells to the router that asked, without Serve: whose they are, and what happens when either end goes."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from actors.frames import LineAddress, connect, framed, new_token
from cluster.event_lines import Call, EventLines, EventServer, Placed
from cluster.pulse import Beat, Pulse
from tests.actors.test_line import rest
from twotower.core import BlockEvent, FailureEvent, FinishReason, RequestId, ScoreEvent
from twotower.errors import NumericalError, Unavailable
from twotower.wire import to_json


def _block(start: int, reason: FinishReason | None = None) -> BlockEvent:
    return BlockEvent(RequestId("same"), start, (5,), 1, 1, reason)


def _beat() -> Beat:
    return Beat("cell", True, 1, 2, 3)


@asynccontextmanager
async def _ends() -> AsyncIterator[tuple[EventServer, EventLines]]:
    server, lines = EventServer(), EventLines(_beat)
    await server.start("127.0.0.1")
    try:
        yield server, lines
    finally:
        await lines.close()
        server.stop()


async def test_calls_of_one_request_id_do_not_hear_each_other() -> None:
    async with _ends() as (server, lines), asyncio.timeout(5):
        calls = [server.open(merging=False) for _ in range(2)]
        line = await lines.to(server.address)
        assert await lines.to(server.address) is line, "one connection serves all calls"
        for start in range(3):
            for number, call in enumerate(calls):
                await line.send(call.reply_to.key, _block(10 * number + start))
        for number, call in enumerate(calls):
            assert [await call.inbox.get() for _ in range(3)] == [_block(10 * number + start) for start in range(3)]


async def test_merging_calls_get_what_piled_up_as_one() -> None:
    async with _ends() as (server, lines), asyncio.timeout(5):
        call = server.open(merging=True)
        line = await lines.to(server.address)
        for start in range(3):
            await line.send(call.reply_to.key, _block(start))
        await line.send(call.reply_to.key, _block(3, FinishReason.LENGTH))
        await asyncio.sleep(0.05)
        assert await call.inbox.get() == BlockEvent(RequestId("same"), 0, (5, 5, 5, 5), 4, 4, FinishReason.LENGTH)


async def test_scores_cross_to_the_last_bit() -> None:
    async with _ends() as (server, lines), asyncio.timeout(5):
        call = server.open(False)
        scores = ScoreEvent(RequestId("same"), (-1e-45, -0.10000000149011612) * 2000, (True, False) * 2000, 1e-12)
        await (await lines.to(server.address)).send(call.reply_to.key, scores)
        assert await call.inbox.get() == scores


async def test_an_error_crosses_and_a_closed_call_hears_nothing() -> None:
    async with _ends() as (server, lines), asyncio.timeout(5):
        gone, call = server.open(False), server.open(False)
        server.close(gone)
        assert not server.is_open(gone) and server.is_open(call)
        line = await lines.to(server.address)
        await line.send(gone.reply_to.key, _block(0))
        await line.send(call.reply_to.key, FailureEvent(RequestId("same"), NumericalError("NaN in block 3")))
        with pytest.raises(NumericalError, match=r"^NaN in block 3$"):
            await call.placed
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await gone.inbox.get()


async def test_a_router_that_is_gone_is_noticed() -> None:
    async with _ends() as (server, lines), asyncio.timeout(5):
        call = server.open(False)
        line = await lines.to(server.address)
        await line.send(call.reply_to.key, _block(0))
        await asyncio.sleep(0.05)
        server.stop()
        while not line.lost:
            await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="router"):
            await line.send(call.reply_to.key, _block(1))
        with pytest.raises(Unavailable, match="cannot be reached"):
            await lines.to(server.address)


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_cancel_that_comes_with_the_routers_end_stays_one(cancelled: bool) -> None:
    """And of the line's own nothing is left."""
    async with _ends() as (server, lines), asyncio.timeout(5):
        line = await lines.to(server.address)

        async def call() -> int:
            task = asyncio.current_task()
            assert task is not None
            with pytest.raises(Unavailable, match="the router that asked is gone"), line.held():
                await asyncio.Event().wait()
            return task.cancelling()

        calling = asyncio.create_task(call())
        await asyncio.sleep(0)
        ended = asyncio.StreamReader()
        ended.feed_eof()
        await line.watch(ended)  # does not wait: what follows is in the same turn of the loop
        if cancelled:
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
        else:
            assert await calling == 0


@asynccontextmanager
async def _raw_cell(server: EventServer, *frames: object) -> AsyncIterator[None]:
    """A cell's end that says these and nothing more."""
    _, writer = await connect(server.address, 1.0)
    for frame in frames:
        writer.write(framed(to_json(frame)))
    try:
        yield
    finally:
        writer.close()


def _frames(call: Call) -> list[object]:
    beat = {"cell": "c", "serves": True, "running": 0, "waiting": 0, "slots": 1}
    return [[None, ["Beat", beat]], [call.reply_to.key, ["Placed", {"cell": "c", "fingerprint": "f"}]]]


@pytest.mark.parametrize("end", ["closed", "silent"])
async def test_calls_of_a_cell_that_is_gone_hear_so(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if end == "silent":
        monkeypatch.setattr("cluster.pulse.BEAT_S", 0.02)
    async with _ends() as (server, lines), asyncio.timeout(5):
        call, elsewhere, unplaced = (server.open(False) for _ in range(3))
        line = await lines.to(server.address)
        await line.send(elsewhere.reply_to.key, Placed("cell", "f"))
        await elsewhere.placed
        async with _raw_cell(server, *_frames(call)):
            assert await call.placed == Placed("c", "f")
            assert server.living() == {"c", "cell"} and server.dead() == set()
            if end == "silent":
                failure = await call.inbox.get()
        if end == "closed":
            failure = await call.inbox.get()
        assert isinstance(failure, FailureEvent) and type(failure.error) is Unavailable
        assert str(failure.error).endswith("is gone" if end == "closed" else "has been silent for 3 s")
        await asyncio.sleep(0.1)  # many beats, where they are short: the one that speaks stays
        assert server.living() == {"cell"} and server.dead() == {"c"}
        assert not unplaced.placed.done()
        await line.send(elsewhere.reply_to.key, _block(0))
        assert await elsewhere.inbox.get() == _block(0)
        async with _raw_cell(server, *_frames(unplaced)):
            await unplaced.placed
            assert server.dead() == set(), "it is back"


async def test_a_cell_that_cannot_serve_is_no_living_one() -> None:
    async with _ends() as (server, _), asyncio.timeout(5):
        beat = {"cell": "c", "serves": False, "running": 0, "waiting": 0, "slots": 1}
        async with _raw_cell(server, [None, ["Beat", beat]]):
            while server.dead() != {"c"}:
                await asyncio.sleep(0.001)
            assert server.living() == set()


@pytest.mark.parametrize("speaks", [True, False])
async def test_a_lease_ends_with_a_routers_silence(speaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.pulse.BEAT_S", 0.02)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while await reader.read(100):
                if speaks:
                    writer.write(b".")

    router, lines = await asyncio.start_server(serve, "127.0.0.1", 0), EventLines(_beat)
    line = await lines.to(LineAddress("127.0.0.1", router.sockets[0].getsockname()[1], new_token()))

    async def call() -> None:
        with line.held():
            await asyncio.sleep(0.3)

    async with asyncio.timeout(5):
        if speaks:
            await call()
        else:
            with pytest.raises(Unavailable, match="the router that asked is gone"):
                await call()
    assert line.lost is not speaks
    await lines.close()
    router.close()


async def test_an_end_that_was_held_up_itself_hangs_up_on_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.pulse.BEAT_S", 0.01)
    said, hung_up = [], list[bool]()
    pulse = Pulse(lambda: said.append(True), lambda: hung_up.append(True), 3)
    beating = asyncio.create_task(pulse.beat())
    await asyncio.sleep(0)
    for _ in range(5):
        time.sleep(0.05)  # five beats' time
        await asyncio.sleep(0)
        pulse.heard()  # what the other end has said meanwhile
    assert not hung_up and not beating.done()
    await beating
    assert hung_up == [True] and len(said) >= 4


async def test_strangers_and_nonsense_end_their_own_connection_only() -> None:
    async with _ends() as (server, lines), asyncio.timeout(5):
        call = server.open(False)
        line = await lines.to(server.address)
        for address, frame in (
            (replace(server.address, token=new_token()), b'[0,["BlockEvent",{}]]'),
            (server.address, b"nonsense"),
            (server.address, b'{"key":0}'),
            (server.address, f'[{call.reply_to.key},["BlockEvent",{{}}]]'.encode()),
        ):
            reader, writer = await connect(address, 1.0)
            writer.write(framed(frame))
            assert not await rest(reader)
            writer.close()
        await line.send(call.reply_to.key, _block(7))
        assert await call.inbox.get() == _block(7)
