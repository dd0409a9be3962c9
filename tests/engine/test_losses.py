"""What ends a pair ends it at once, for everybody, with the reason; what ends one request ends only that."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from tests.engine.arrangements import LINK, hooks_of
from tests.engine.decode import SETTINGS, collect
from tests.goldens import CPU, vendored
from twotower.core import BlockEvent, DecodingParams, Event, FinishReason, Mode, ReleasedEvent, Request, RequestId
from twotower.engine.answer import Answer
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.handle import EngineStats
from twotower.engine.ledger import Ledger
from twotower.engine.modes.block_steps import of_like_width
from twotower.engine.modes.diffusion import Diffusion
from twotower.engine.modes.strategy import LedSequence
from twotower.engine.pair import Pair
from twotower.engine.runner import EngineRunner
from twotower.errors import LinkDown, Overloaded, Unavailable
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.distributed_link import DistributedLink
from twotower.exchange.distributed_port import DistributedPort
from twotower.model.cache import TowerCache
from twotower.model.room import Room


def _request(name: str, mode: Mode = Mode.DIFFUSION, tokens: int = 200) -> Request:
    return Request(RequestId(name), (1, 5, 9), DecodingParams(mode=mode, max_new_tokens=tokens, ignore_eos=True))


@pytest.mark.slow
@pytest.mark.parametrize("end", ["link", "port"])
async def test_a_lost_link_ends_what_the_denoiser_leads_though_both_engines_live(end: str) -> None:
    """Two runners, as in two processes: the link between them goes, neither dies, and the context tower serves on."""
    model = vendored("tt_moe")
    first, second = EngineRunner(), EngineRunner()
    context = ContextEngine(model.context, SETTINGS, first.emit)
    port, address = open_port(context.cache, 0, 0, LINK, hooks_of(first))
    context.connect(port)
    first.start([context])
    mirror = TowerCache(model.context.config, SETTINGS.max_sequences, SETTINGS.pages, CPU, torch.float32)
    link = await asyncio.to_thread(connect, address, mirror, hooks_of(second))
    assert isinstance(link, DistributedLink) and isinstance(port, DistributedPort)
    second.start([DenoiserEngine(model.denoiser, link, SETTINGS, second.emit)])
    rooms = [Room(SETTINGS.max_sequences, SETTINGS.pages) for _ in range(2)]
    try:
        async with Pair(first, [second], Ledger(rooms[0], rooms[1:], 8)) as pair:
            stream = pair.generate(_request("running"))
            assert (await anext(stream)).token_ids
            (link if end == "link" else port)._endpoint.lose("the wire was cut")
            said = "the wire was cut" if end == "link" else "the context side is gone"
            with pytest.raises(LinkDown, match=f"link 0 epoch 0: {said}"):
                while True:
                    await anext(stream)
            for _ in range(30):
                if pair.lost:
                    break
                await asyncio.sleep(0.1)
            assert said in str(pair.lost[0]) and pair.failure is None
            with pytest.raises(Unavailable, match=said):
                await collect(pair, _request("later", Mode.DIFFUSION))
            assert (await collect(pair, _request("later", Mode.AR))).token_ids
        while context.stats(0.0).sequences:
            await asyncio.sleep(0.01)
    finally:
        for runner in (second, first):
            await asyncio.to_thread(runner.stop)


class SlowToAdd:
    """An engine behind calls that overtake one another: `add` takes its time, `cancel` does not."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._happened: asyncio.Queue[Event] = asyncio.Queue()

    def add(self, requests: Sequence[Request]) -> None:
        self.log += [f"add {request.id}" for request in requests]

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        self.log += [f"cancel {request_id}" for request_id in request_ids]
        for request_id in request_ids:
            self._happened.put_nowait(ReleasedEvent(request_id))

    def finish(self, request_id: str) -> None:
        name = RequestId(request_id)
        self._happened.put_nowait(BlockEvent(name, 0, (7,), 1, 1, FinishReason.LENGTH))
        self._happened.put_nowait(ReleasedEvent(name))

    async def events(self) -> list[Event]:
        return [await self._happened.get()]

    async def stats(self) -> list[EngineStats]:
        return []


async def test_a_cancel_follows_its_own_add() -> None:
    engine = SlowToAdd()
    async with Pair(engine, [], Ledger(Room(4, 64), [], 4)) as pair:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await collect(pair, _request("hasty", Mode.AR))
        with pytest.raises(Overloaded, match="still being released"):
            await collect(pair, _request("hasty", Mode.AR))
        await asyncio.sleep(0.1)
        assert engine.log == ["add hasty", "cancel hasty"]
        assert pair.ledger.running == 0
        again = asyncio.create_task(collect(pair, _request("hasty", Mode.AR)))
        await asyncio.sleep(0.1)
        engine.finish("hasty")
        assert (await again).token_ids == [7]


class Broken(SlowToAdd):
    """An engine whose `add` has a bug."""

    def add(self, requests: Sequence[Request]) -> None:
        raise TypeError("a bug\nof several lines")


async def test_a_bug_in_a_message_to_an_engine_ends_the_pair_in_one_line() -> None:
    async with Pair(Broken(), [], Ledger(Room(4, 64), [], 4)) as pair:
        with pytest.raises(Unavailable) as failure:
            await collect(pair, _request("x", Mode.AR))
    assert str(failure.value) == "a message to an engine failed: TypeError"


def test_a_wide_block_does_not_widen_its_neighbours() -> None:
    """Forwards by width: 16 and less together, wider ones apart, none with more positions than fit."""
    request = _request("x")

    mode = Diffusion(cast(Any, None), trace=None)

    def sequence(size: int) -> LedSequence:
        return LedSequence(Answer.begun(request, eos_token_id=2), 0, mode, tokens=[3] * size)

    sizes = [[len(s.tokens) for s in batch] for batch in of_like_width([sequence(n) for n in (16, 1024, 3, 40, 64)])]
    assert sorted(map(sorted, sizes)) == [[3, 16], [40, 64], [1024]]
    assert [len(batch) for batch in of_like_width([sequence(1024)] * 5)] == [2, 2, 1]


def test_the_ledger_takes_a_mirror_that_fits_over_one_with_more_slots() -> None:
    ledger = Ledger(Room(20, 1000), [Room(10, 5), Room(9, 500)], 4)
    ledger.enqueue(_request("long", tokens=160))
    [(_, place)] = ledger.admit()
    assert place.denoiser == 1


def test_a_request_reserves_no_room_for_the_block_that_is_never_read() -> None:
    assert _request("x", Mode.DIFFUSION, 4).positions == 3
    assert _request("x", Mode.DIFFUSION, 17).positions == 3 + 16
    assert _request("x", Mode.AR, 10).positions == 3 + 9
