"""A denoiser that would wait for all of its rows gets half of them back sooner, and then they are out of step."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from twotower.core import BlockEvent, DecodingParams, Event, Mode, ReleasedEvent, Request, RequestId
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.settings import EngineSettings
from twotower.exchange.local import LocalExchange
from twotower.exchange.protocol import Commit, Delta, Port, Prefill
from twotower.testing import ScriptedContextTower, ScriptedDenoiserTower, scripted_tokens

SETTINGS = EngineSettings(max_sequences=16, max_sequence_length=256, capture="off")
BLOCKS, STEPS = 6, 4


def _context(apart: bool) -> tuple[ContextEngine, LocalExchange, list[int], list[Event]]:
    """With how many blocks each of its commits will have read."""
    events: list[Event] = []
    engine = ContextEngine(cast(Any, ScriptedContextTower()), SETTINGS, events.append)
    exchange = LocalExchange(engine.cache, lambda: None)
    cast(Port, exchange.port).apart = apart
    engine.connect(exchange.port)
    commits: list[int] = []
    commit = engine._commit

    def counting(sequences: list[Any]) -> None:
        commits.append(len(sequences))
        commit(sequences)

    engine._commit = counting  # type: ignore[method-assign]
    return engine, exchange, commits, events


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("apart", [False, True])
def test_rows_of_equal_blocks(rows: int, apart: bool) -> None:
    """Of 4 steps each. In one process, where nothing is gained by it, they stay together: larger batches."""
    context, exchange, commits, events = _context(apart)
    denoiser = DenoiserEngine(cast(Any, ScriptedDenoiserTower()), exchange.link, SETTINGS, events.append)
    params = DecodingParams(
        Mode.DIFFUSION, 8 * BLOCKS, block_size=8, steps_per_block=STEPS, confidence_threshold=1.0, ignore_eos=True
    )
    requests = [Request(RequestId(str(row)), (5, 6, 7 + row), params) for row in range(rows)]
    for request in requests:
        denoiser.add(request)
    idle = ticks = 0
    with torch.inference_mode():
        while sum(isinstance(event, ReleasedEvent) for event in events) < rows:
            context.tick()
            idle += not denoiser.tick()
            ticks += 1
            assert ticks < 1000
    tokens = {
        request.id: [t for e in events if isinstance(e, BlockEvent) and e.request_id == request.id for t in e.token_ids]
        for request in requests
    }
    assert tokens == {request.id: scripted_tokens(request) for request in requests}
    assert sum(commits) == rows * (BLOCKS - 1)
    if apart and rows > 1:
        assert max(commits) == -(-rows // 2) and idle <= 4
    else:
        assert set(commits) == {rows}


def _ask(exchange: LocalExchange, commands: Sequence[Prefill | Commit]) -> None:
    exchange.link.submit(commands)


def test_while_one_of_them_still_steps_nobody_waits_longer() -> None:
    context, exchange, commits, _ = _context(apart=True)
    _ask(exchange, [Prefill(number, (5, 6), 64) for number in range(4)])
    with torch.inference_mode():
        context.tick()
        _ask(exchange, [Commit(number, 2, (9,) * 8) for number in range(3)])
        context.tick()
        assert commits == [3]
        _ask(exchange, [Commit(number, 2 if number == 3 else 10, (9,) * 8) for number in range(4)])
        exchange.link.poll()
        context.tick()
        _ask(exchange, [Commit(number, 18, (9,) * 8) for number in range(2)])  # they were read first, and go before
        context.tick()
        context.tick()
    assert commits == [3, 2, 2, 2]
    told = [event.sequence for event in exchange.link.poll() if isinstance(event, Delta)]
    assert told == [0, 1, 2, 3, 0, 1], "first come, first served"


def test_single_tokens_are_read_together() -> None:
    """Mock-AR's: its denoiser steps on them meanwhile, and waits for nobody."""
    context, exchange, commits, _ = _context(apart=True)
    _ask(exchange, [Prefill(number, (5, 6), 64) for number in range(4)])
    with torch.inference_mode():
        context.tick()
        _ask(exchange, [Commit(number, 2, (9,)) for number in range(4)])
        context.tick()
    assert commits == [4]
