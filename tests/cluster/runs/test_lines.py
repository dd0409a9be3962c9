"""Events from cells to the router that asked, without Serve: whose they are, and what happens when either end goes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.runs.cell_lines import CellLines
from cluster.runs.messages import Beat, Block, Failed, Placed, Scored, about
from cluster.runs.router_lines import RouterLine, RouterLines
from twotower.core import (
    BlockEvent,
    FailureEvent,
    FinishReason,
    Mode,
    RequestId,
    RoundEvent,
    ScoreEvent,
    StepEvent,
)
from twotower.errors import NumericalError, Unavailable

NAME = RequestId("same")


def _block(start: int, reason: FinishReason | None = None) -> BlockEvent:
    return BlockEvent(NAME, start, (5,), 1, 1, reason)


def _beat(cell: str = "cell", modes: tuple[Mode, ...] = tuple(Mode), fingerprint: str = "f", waiting: int = 0) -> Beat:
    return Beat(cell, fingerprint, modes, 1, waiting, 3)


@asynccontextmanager
async def _ends(silence_s: float = 3.0, beat: Beat | None = None) -> AsyncIterator[tuple[CellLines, RouterLines]]:
    """A router's and a cell's."""
    router, cell = CellLines(silence_s), RouterLines(lambda: beat or _beat(), silence_s)
    await router.start("127.0.0.1")
    try:
        async with asyncio.timeout(10):
            yield router, cell
    finally:
        await cell.close()
        router.stop()
        await asyncio.sleep(0.01)


async def test_calls_of_one_request_id_do_not_hear_each_other() -> None:
    async with _ends() as (router, cell):
        calls = [router.open(merging=False) for _ in range(2)]
        line, same = await asyncio.gather(cell.to(router.address), cell.to(router.address))
        assert line is same and await cell.to(router.address) is line, "one connection serves all calls"
        for start in range(3):
            for number, call in enumerate(calls):
                await line.send(Block(call.reply_to.call, _block(10 * number + start)))
        for number, call in enumerate(calls):
            assert [await call.inbox.get() for _ in range(3)] == [_block(10 * number + start) for start in range(3)]


async def test_a_cell_has_a_load_while_its_beats_come_in_time() -> None:
    async with _ends(beat=_beat(waiting=2)) as (router, cell):
        line = await cell.to(router.address)
        while not router.load():
            await asyncio.sleep(0.001)
        calls = [router.open(merging=False) for _ in range(2)]
        for call in calls:
            await line.send(Placed(call.reply_to.call, "cell", "f"))
            await call.placed
        assert router.load() == {"cell": 1 + 2 + 2}
        router.close(calls[0])
        assert router.load() == {"cell": 1 + 2 + 1}
        [heard] = router._lines
        heard.connection._unheard = 2
        assert router.load() == {} and router.living() == {"cell"}
        await line.send(Placed(calls[1].reply_to.call, "cell", "f"))
        while not router.load():
            await asyncio.sleep(0.001)


async def test_merging_calls_get_what_piled_up_as_one() -> None:
    async with _ends() as (router, cell):
        call = router.open(merging=True)
        line = await cell.to(router.address)
        for start in range(3):
            await line.send(Block(call.reply_to.call, _block(start)))
        await line.send(Block(call.reply_to.call, _block(3, FinishReason.LENGTH)))
        await asyncio.sleep(0.05)
        assert await call.inbox.get() == BlockEvent(NAME, 0, (5, 5, 5, 5), 4, 4, FinishReason.LENGTH)


async def test_scores_cross_to_the_last_bit() -> None:
    async with _ends() as (router, cell):
        call = router.open(False)
        scores = ScoreEvent(NAME, (-1e-45, -0.10000000149011612) * 2000, (True, False) * 2000, 1e-12)
        await (await cell.to(router.address)).send(Scored(call.reply_to.call, scores))
        assert await call.inbox.get() == scores


async def test_a_trace_crosses_between_the_blocks() -> None:
    step, verdict = StepEvent(NAME, 1, 2, 0, (1, 2), (5, 6), (0.25, 0.5)), RoundEvent(NAME, 1, (5, 6), 1, 7)
    async with _ends() as (router, cell):
        call = router.open(merging=False)
        line = await cell.to(router.address)
        for event in (_block(0), step, verdict, _block(1)):
            await line.send(about(call.reply_to.call, event))
        assert [await call.inbox.get() for _ in range(4)] == [_block(0), step, verdict, _block(1)]


async def test_an_error_crosses_and_a_closed_call_hears_nothing() -> None:
    async with _ends() as (router, cell):
        gone, call = router.open(False), router.open(False)
        router.close(gone)
        assert not router.is_open(gone) and router.is_open(call)
        line = await cell.to(router.address)
        await line.send(Block(gone.reply_to.call, _block(0)))
        await line.send(Failed(call.reply_to.call, FailureEvent(NAME, NumericalError("NaN in block 3"))))
        with pytest.raises(NumericalError, match=r"^NaN in block 3$"):
            await call.placed
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await gone.inbox.get()


async def test_a_router_that_is_gone_is_noticed() -> None:
    async with _ends() as (router, cell):
        call = router.open(False)
        line = await cell.to(router.address)
        await line.send(Block(call.reply_to.call, _block(0)))
        await asyncio.sleep(0.05)
        router.stop()
        while not line.is_lost:
            await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="the router that asked is gone"):
            await line.send(Block(call.reply_to.call, _block(1)))
        with pytest.raises(Unavailable, match=r"the router at .* cannot be reached"):
            await cell.to(router.address)


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_cancel_that_comes_with_the_routers_end_stays_one(cancelled: bool) -> None:
    """And of the line's own nothing is left."""
    line = RouterLine(_beat)

    async def call() -> int:
        task = asyncio.current_task()
        assert task is not None
        with pytest.raises(Unavailable, match="the router that asked is gone"), line.held():
            await asyncio.Event().wait()
        return task.cancelling()

    calling = asyncio.create_task(call())
    await asyncio.sleep(0)
    line.lost("is gone")
    if cancelled:
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
    else:
        assert await calling == 0


@pytest.mark.parametrize("end", ["closed", "silent"])
@pytest.mark.slow
async def test_calls_of_a_cell_that_is_gone_hear_so(end: str) -> None:
    async with _ends(silence_s=0.3) as (router, cell):
        dying = RouterLines(lambda: _beat("c"))
        call, elsewhere, unplaced = (router.open(False) for _ in range(3))
        line, dying_line = await cell.to(router.address), await dying.to(router.address)
        await line.send(Placed(elsewhere.reply_to.call, "cell", "f"))
        await elsewhere.placed
        await dying_line.send(Placed(call.reply_to.call, "c", "f"))
        assert await call.placed == Placed(call.reply_to.call, "c", "f")
        assert router.living() == {"c", "cell"} and router.unfit(Mode.AR) == set()
        connection: Any = dying_line.connection
        if end == "closed":
            connection.close()
        else:
            connection._timer.cancel()
        failure = await call.inbox.get()
        assert isinstance(failure, FailureEvent) and type(failure.error) is Unavailable
        assert str(failure.error).endswith("is gone" if end == "closed" else "has been silent for 0.3 s")
        await asyncio.sleep(0.1)  # the one that speaks stays
        assert router.living() == {"cell"} and router.unfit(Mode.AR) == {"c"}
        assert not unplaced.placed.done()
        await line.send(Block(elsewhere.reply_to.call, _block(0)))
        assert await elsewhere.inbox.get() == _block(0)
        back = await dying.to(router.address)
        await back.send(Placed(unplaced.reply_to.call, "c", "f"))
        await unplaced.placed
        assert router.unfit(Mode.AR) == set(), "it is back"
        await dying.close()


async def test_a_cell_that_cannot_serve_is_no_living_one() -> None:
    async with _ends(beat=_beat("c", ())) as (router, cell):
        await cell.to(router.address)
        while router.unfit(Mode.AR) != {"c"}:
            await asyncio.sleep(0.001)
        assert router.living() == set()


async def test_a_cell_without_its_denoiser_is_fit_for_what_needs_none() -> None:
    async with _ends(beat=_beat("c", (Mode.AR,))) as (router, cell):
        await cell.to(router.address)
        while router.living() != {"c"}:
            await asyncio.sleep(0.001)
        assert router.living(Mode.AR) == {"c"} and router.unfit(Mode.AR) == set()
        assert router.living(Mode.DIFFUSION) == set() and router.unfit(Mode.DIFFUSION) == {"c"}
        assert router.served() == {Mode.AR}


@pytest.mark.parametrize("speaks", [True, False])
@pytest.mark.slow
async def test_a_lease_ends_with_a_routers_silence(speaks: bool) -> None:
    async with _ends(silence_s=0.15) as (router, cell):
        line = await cell.to(router.address)
        [cells_line] = router._lines
        connection: Any = cells_line.connection

        async def call() -> None:
            with line.held():
                await asyncio.sleep(0.5)

        if speaks:
            await call()
        else:
            connection._timer.cancel()
            with pytest.raises(Unavailable, match="the router that asked is gone"):
                await call()
        assert line.is_lost is not speaks


async def test_a_router_has_nothing_to_say() -> None:
    async with _ends() as (router, cell):
        line = await cell.to(router.address)
        [cells_line] = router._lines
        cells_line.connection.post(_beat())
        while not line.is_lost:
            await asyncio.sleep(0.001)


async def test_a_closed_end_connects_to_nobody() -> None:
    async with _ends() as (router, cell):
        await cell.close()
        with pytest.raises(Unavailable, match="the cell is shutting down"):
            await cell.to(router.address)


async def test_who_has_room() -> None:
    async with _ends() as (router, cell):
        beats = [_beat("full", waiting=2), _beat("other", fingerprint="another"), _beat("causal", (Mode.AR,))]
        more = [RouterLines(lambda beat=beat: beat) for beat in beats]
        for lines in (cell, *more):
            await lines.to(router.address)
        while len(router.living()) < 4:
            await asyncio.sleep(0.001)
        assert router.with_room(Mode.DIFFUSION, "f") == {"cell"}
        assert router.with_room(Mode.AR, "f") == {"cell", "causal"}
        for lines in more:
            await lines.close()
