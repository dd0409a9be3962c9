"""A denoiser that waits for all of its rows gets half of them back sooner, and from then on they are out of step."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest
import torch

from tests.engine.arrangements import LINK
from twotower.core import BlockEvent, DecodingParams, Event, Mode, ReleasedEvent, Request, RequestId, ScoreRequest
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.scheduler import Key
from twotower.engine.settings import EngineSettings
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.local import LocalExchange
from twotower.exchange.protocol import Command, Commit, Delta, Link, Port, Prefill, Release
from twotower.model.cache import TowerCache
from twotower.testing import ScriptedContextTower, ScriptedDenoiserTower, scripted_tokens

SETTINGS = EngineSettings(max_sequences=16, max_sequence_length=256, prefill_chunk_tokens=64, capture="off")
BLOCKS, STEPS = 6, 4


class Counting(ContextEngine):
    """With how many blocks each of its commits has read."""

    def __init__(self, emit: Callable[[Event], None] = lambda _: None) -> None:
        super().__init__(cast(Any, ScriptedContextTower()), SETTINGS, emit)
        self.commits: list[int] = []
        read = self._commits.read

        def counted(keys: Sequence[Key]) -> None:
            self.commits.append(len(keys))
            read(keys)

        self._commits.read = counted  # type: ignore[method-assign]


def _joined(context: ContextEngine, apart: bool) -> LocalExchange:
    """With one more denoiser."""
    exchange = LocalExchange(context.cache, lambda: None)
    cast(Port, exchange.port).apart = apart
    context.connect(exchange.port)
    return exchange


def _decode(rows: int, link: Link, context: Counting, events: list[Event], rest_s: float = 0.0) -> int:
    """Rows alike, of blocks of 4 steps, until all of them are released. How often the denoiser had nothing to step."""
    denoiser = DenoiserEngine(cast(Any, ScriptedDenoiserTower()), link, SETTINGS, events.append)
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
            time.sleep(rest_s)
            idle += not denoiser.tick()
            ticks += 1
            assert ticks < 1000
    blocks = [event for event in events if isinstance(event, BlockEvent)]
    tokens = {r.id: [t for block in blocks if block.request_id == r.id for t in block.token_ids] for r in requests}
    assert tokens == {request.id: scripted_tokens(request) for request in requests}
    assert sum(context.commits) == rows * (BLOCKS - 1)
    return idle


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("apart", [False, True])
def test_rows_of_equal_blocks(rows: int, apart: bool) -> None:
    """In one process, where nothing is gained by it, they stay together: larger batches."""
    events: list[Event] = []
    context = Counting(events.append)
    idle = _decode(rows, _joined(context, apart).link, context, events)
    if apart and rows > 1:
        assert max(context.commits) == -(-rows // 2) and idle <= 4
    else:
        assert set(context.commits) == {rows}


def test_over_a_mirror() -> None:
    events: list[Event] = []
    context = Counting(events.append)
    port, address = open_port(context.cache, 0, 0, LINK)
    context.connect(port)
    tower, pages = ScriptedContextTower, SETTINGS.pages
    mirror = TowerCache(tower.config, SETTINGS.max_sequences, pages, tower.device, tower.dtype)
    link = connect(address, mirror)
    try:
        _decode(4, link, context, events, rest_s=0.002)
    finally:
        link.close()
        port.close()
    assert context.commits[:2] == [2, 2], "the first blocks, which all of them wait for"


def _asked(exchange: LocalExchange, context: ContextEngine, *commands: Command) -> None:
    exchange.link.submit(commands)
    context.tick()


def _block(number: int, start: int, width: int = 8) -> Commit:
    return Commit(number, start, (9,) * width)


@pytest.fixture
def four() -> Iterator[tuple[ContextEngine, LocalExchange, list[int]]]:
    """A context engine that has read four prompts for a denoiser apart."""
    context = Counting()
    exchange = _joined(context, apart=True)
    with torch.inference_mode():
        _asked(exchange, context, *(Prefill(number, (5, 6), 64) for number in range(4)))
        yield context, exchange, context.commits


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


@pytest.mark.parametrize(
    ("apart", "waits", "read"), [(True, True, [4, 3]), (True, False, [6]), (False, True, [7]), (False, False, [6])]
)
def test_of_two_denoisers_both_must_wait(four: Four, apart: bool, waits: bool, read: list[int]) -> None:
    """Beside the tower, the second one too; and with all it has."""
    context, exchange, commits = four
    other = _joined(context, apart)
    _asked(other, context, *(Prefill(number, (5, 6), 64) for number in range(3)))
    other.link.submit([_block(number, 2) for number in range(3 if waits else 2)])
    _asked(exchange, context, *(_block(number, 2) for number in range(4)))
    while sum(commits) < sum(read):
        context.tick()
    assert commits == read
