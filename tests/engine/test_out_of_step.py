"""A denoiser that waits for all of its rows gets half of them back sooner, and from then on they are out of step."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from twotower.core import BlockEvent, DecodingParams, Event, Mode, ReleasedEvent, Request, RequestId, ScoreRequest
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.settings import EngineSettings
from twotower.exchange.local import LocalExchange
from twotower.exchange.protocol import Command, Commit, Delta, Port, Prefill, Release
from twotower.testing import ScriptedContextTower, ScriptedDenoiserTower, scripted_tokens

SETTINGS = EngineSettings(max_sequences=16, max_sequence_length=256, prefill_chunk_tokens=64, capture="off")
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


def _asked(exchange: LocalExchange, context: ContextEngine, *commands: Command) -> None:
    exchange.link.submit(commands)
    context.tick()


def _block(number: int, start: int, width: int = 8) -> Commit:
    return Commit(number, start, (9,) * width)


@pytest.fixture
def four() -> Iterator[tuple[ContextEngine, LocalExchange, list[int]]]:
    """A context engine that has read four prompts for a denoiser apart."""
    context, exchange, commits, _ = _context(apart=True)
    with torch.inference_mode():
        _asked(exchange, context, *(Prefill(number, (5, 6), 64) for number in range(4)))
        yield context, exchange, commits


Four = tuple[ContextEngine, LocalExchange, list[int]]


def test_while_one_of_them_still_steps_nobody_waits_longer(four: Four) -> None:
    context, exchange, commits = four
    _asked(exchange, context, *(_block(number, 2) for number in range(3)))
    assert commits == [3]
    _asked(exchange, context, _block(3, 2), *(_block(number, 10) for number in range(3)))
    _asked(exchange, context, _block(3, 10), _block(0, 18))
    assert commits == [3, 2, 4], "3 and 0, then 1 and 2 and those two again"
    told = [event.sequence for event in exchange.link.poll() if isinstance(event, Delta) and event.start > 0]
    assert told == [0, 1, 2, 3, 0, 1, 2, 3, 0], "first come, first served"


def test_single_tokens_are_read_together(four: Four) -> None:
    """Mock-AR's: its denoiser steps on them meanwhile, and waits for nobody."""
    context, exchange, commits = four
    _asked(exchange, context, *(_block(number, 2, 1) for number in range(4)))
    _asked(exchange, context, _block(0, 3, 1), *(_block(number, 3) for number in range(1, 4)))
    assert commits == [4, 4]


def test_a_prompt_that_is_read_meanwhile_makes_nobody_wait_twice(four: Four) -> None:
    context, exchange, commits = four
    context.add(ScoreRequest(RequestId("long"), tuple(range(4, 32)) * 7, 100))
    for block in range(5):  # the fourth and last chunk is read behind the fourth batch of blocks
        _asked(exchange, context, *(_block(number, 2 + 8 * block) for number in range(4)))
        context.tick()
    assert commits == [4, 4, 4, 4, 2, 2]


@pytest.mark.parametrize("lost", [False, True])
def test_what_ends_between_the_halves_is_not_read(four: Four, lost: bool) -> None:
    context, exchange, commits = four
    _asked(exchange, context, *(_block(number, 2) for number in range(4)))
    if lost:
        exchange.link.close()
    else:
        exchange.link.submit([Release(2), Release(3)])
    context.tick()
    assert commits == [2]
    stats = context.stats(0.0)
    assert stats.sequences == stats.total_slots - stats.free_slots == (0 if lost else 2)
