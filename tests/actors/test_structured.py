"""Each kind of tower process finds the checkpoint's tokenizer and follows grammars with it, without Ray."""

import asyncio
import re

import pytest

from actors.settings import CellSettings
from actors.towers import ColocatedProcess, ContextProcess, DenoiserProcess
from tests.actors.test_cell import DEMO
from twotower.constraints import Constraint
from twotower.core import BlockEvent, DecodingParams, FailureEvent, Mode, ReleasedEvent, Request, RequestId
from twotower.engine.runner import EngineRunner
from twotower.engine.settings import EngineSettings
from twotower.text.tokenizer import load_tokenizer

ENGINE = EngineSettings(2, 128, link_timeout_s=60, capture="off")


async def _answer(runner: EngineRunner, mode: Mode) -> str:
    constraint = Constraint("regex", "[a-z]{4,8} [0-9]{2}")
    params = DecodingParams(mode, 32, structured_outputs=constraint)
    runner.add([Request(RequestId(mode), (5, 6, 7), params)])
    tokens = list[int]()
    while True:
        for event in await runner.events():
            assert not isinstance(event, FailureEvent), event
            if isinstance(event, ReleasedEvent):
                tokenizer = load_tokenizer(DEMO)
                assert tokenizer is not None and re.fullmatch(constraint.text, tokenizer.decode(tokens))
                return tokenizer.decode(tokens)
            tokens += event.token_ids if isinstance(event, BlockEvent) else ()


@pytest.mark.slow
async def test_both_towers_in_one_process() -> None:
    actor = ColocatedProcess(CellSettings(str(DEMO), device="cpu", placement="colocated", engine=ENGINE))
    await actor.load()
    try:
        assert await _answer(actor.runner, Mode.AR) == await _answer(actor.runner, Mode.VERIFIED)
        await _answer(actor.runner, Mode.DIFFUSION)
    finally:
        await asyncio.to_thread(actor.runner.stop)


@pytest.mark.slow
async def test_a_process_for_each_tower() -> None:
    settings = CellSettings(str(DEMO), device="cpu", placement="split", engine=ENGINE)
    context, denoiser = ContextProcess(settings), DenoiserProcess(settings)
    await context.load()
    await denoiser.load()
    try:
        await denoiser.connect(await context.open_link(0, 0))
        assert await _answer(context.runner, Mode.AR) == await _answer(denoiser.runner, Mode.VERIFIED)
        await _answer(denoiser.runner, Mode.DIFFUSION)
    finally:
        for actor in (denoiser, context):
            await asyncio.to_thread(actor.runner.stop)
