"""Two tower processes of a cell are joined, without Ray."""

import asyncio
import time

import pytest

from actors.settings import CellSettings
from actors.towers import ContextProcess, DenoiserProcess
from tests.goldens import VENDORED
from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.passes import EagerPasses
from twotower.engine.settings import EngineSettings

STALL_S = 2.0


@pytest.mark.slow
async def test_a_denoiser_that_captures_for_long_is_not_taken_for_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the link stands, the context side ends it where the denoiser's engine makes no progress."""
    engine = EngineSettings(2, 64, stall_timeout_s=STALL_S, link_timeout_s=3, capture="off")
    settings = CellSettings(str(VENDORED / "tt_dense"), device="cpu", placement="split", engine=engine)
    context, denoiser = ContextProcess(settings), DenoiserProcess(settings)
    await context.load()
    monkeypatch.setattr(EagerPasses, "prepare", lambda *_: time.sleep(2.5 * STALL_S))
    await denoiser.load()
    try:
        await denoiser.connect(await context.open_link(0, 0))
        [joined] = denoiser.runner.engines
        assert isinstance(joined, DenoiserEngine)
        assert joined.link._endpoint.lost is None  # type: ignore[attr-defined]
    finally:
        for actor in (denoiser, context):
            await asyncio.to_thread(actor.runner.stop)


@pytest.mark.slow
@pytest.mark.parametrize("lives", [True, False], ids=["lets go", "is not asked"])
async def test_a_link_is_forgotten_before_another_denoiser_is_there(lives: bool) -> None:
    """And its room is free then, whatever the denoiser does."""
    engine = EngineSettings(2, 1024, link_timeout_s=3, capture="off")
    settings = CellSettings(str(VENDORED / "tt_dense"), device="cpu", placement="split", engine=engine)
    context, denoiser, other = ContextProcess(settings), DenoiserProcess(settings), DenoiserProcess(settings)
    for actor in (context, denoiser, other):
        await actor.load()
    try:
        await denoiser.connect(await context.open_link(0, 1))
        params = DecodingParams(Mode.DIFFUSION, max_new_tokens=900, ignore_eos=True, confidence_threshold=1.0)
        denoiser.runner.add([Request(RequestId("r"), (5, 6, 7), params)])
        while (await context.stats())[0].free_slots == 2:
            await asyncio.sleep(0.01)
        if lives:
            assert await denoiser.let_go()
        async with asyncio.timeout(10):
            await context.forget_link(0)
        assert (await context.stats())[0].free_slots == 2
        await (denoiser if lives else other).connect(await context.open_link(0, 2))
    finally:
        for actor in (denoiser, other, context):
            await asyncio.to_thread(actor.runner.stop)
