"""A cell that mends itself, over scripted engines: what is served while another denoiser reads its weights."""

import asyncio
import logging
import time
from typing import Any

import pytest

from actors.cell import RunningPair
from actors.settings import CellSettings
from actors.towers import ContextProcess
from tests.engine.test_pair import FakeEngine, _block, _events, _settled, _three, plain_request
from twotower.core import FinishReason, Mode, ReleasedEvent, RequestId
from twotower.errors import Unavailable


class Towers:
    """Of one cell, whose context tower forgets when told, and whose next denoiser is never ready."""

    def __init__(self) -> None:
        self.forgotten, self.asked = asyncio.Event(), list[str]()

    async def context_answers(self) -> bool:
        return True

    async def part(self, denoiser: int) -> None:
        self.asked.append(f"part {denoiser}")
        await self.forgotten.wait()

    async def renew(self, denoiser: int) -> Any:
        self.asked.append(f"renew {denoiser}")
        await asyncio.Event().wait()


async def test_what_needs_no_denoiser_has_its_room_while_another_loads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr("actors.cell._SETTLE_S", 0.0)
    async with _three(denoisers=1, slots=1) as (pair, (context, denoiser), _), asyncio.timeout(5):
        towers: Any = Towers()
        running = RunningPair(CellSettings("x", "cpu"), towers, tuple(Mode), None, "f", "v")
        running.pair, pair._on_loss = pair, running._on_loss
        lost = asyncio.create_task(_events(pair, plain_request("a", Mode.DIFFUSION)))
        await _settled()
        denoiser.die(Unavailable("killed"))
        with pytest.raises(Unavailable, match="killed"):
            await lost
        alone = asyncio.create_task(_events(pair, plain_request("b", Mode.AR)))
        while not towers.asked:
            await asyncio.sleep(0)
        await _settled()
        assert context.added == [], "the context tower has not forgotten yet"
        towers.forgotten.set()
        while not context.added:
            await asyncio.sleep(0)
        context.say(_block("b", reason=FinishReason.STOP), ReleasedEvent(RequestId("b")))
        assert len(await alone) == 1 and running.served() == (Mode.AR,)
        assert towers.asked == ["part 0", "renew 0"]
        assert running._mending is not None
        running._mending.cancel()


class Port:
    """A context tower's port that is forgotten a while after it is closed."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


async def test_whoever_asks_again_waits_until_a_link_is_forgotten() -> None:
    """As after an answer that was too late: the room of what it led is not free yet."""
    actor: Any = ContextProcess.__new__(ContextProcess)
    port, serves = Port(), [True]
    actor._ports, actor._engine, actor.runner = {0: port}, FakeEngine(), FakeEngine()
    actor._engine.serves = lambda asked: serves[0]
    actor.runner.check = actor.runner.wake = lambda: None
    first = asyncio.create_task(actor.forget_link(0))
    while not port.closed:
        await asyncio.sleep(0.001)
    again = asyncio.create_task(actor.forget_link(0))
    await asyncio.sleep(0.05)
    assert not first.done() and not again.done()
    serves[0] = False
    began = time.monotonic()
    await asyncio.gather(first, again)
    await actor.forget_link(0)
    assert actor._ports == {} and time.monotonic() - began < 5
