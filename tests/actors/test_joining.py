"""Two tower processes of a cell are joined, without Ray."""

import asyncio
import time

import pytest

from actors.settings import CellSettings
from actors.towers import ContextActor, DenoiserActor
from tests.goldens import VENDORED
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.passes import EagerPasses
from twotower.engine.settings import EngineSettings

STALL_S = 2.0


@pytest.mark.slow
async def test_a_denoiser_that_captures_for_long_is_not_taken_for_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the link stands, the context side ends it where the denoiser's engine makes no progress."""
    engine = EngineSettings(2, 64, stall_timeout_s=STALL_S, link_timeout_s=3, capture="off")
    settings = CellSettings(str(VENDORED / "tt_dense"), device="cpu", placement="split", engine=engine)
    context, denoiser = ContextActor(settings), DenoiserActor(settings)
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
