"""A long chunk is read in parts: what steps meanwhile comes between them, and nobody's numbers change."""

import random

import pytest
import torch

from tests.goldens import CPU, MODELS, golden
from twotower.core import BlockEvent, DecodingParams, Event, Mode, ReleasedEvent, Request, RequestId, ScoreRequest
from twotower.engine.context_engine import ContextEngine
from twotower.engine.passes import PROMPT_PARTS, EagerPasses, Want
from twotower.engine.settings import EngineSettings
from twotower.model.cache import TowerCache

SETTINGS = EngineSettings(max_sequences=4, max_sequence_length=512, prefill_chunk_tokens=128)


def _request(name: str, length: int, new: int = 4) -> Request:
    draw = random.Random(name)
    prompt = tuple(draw.randrange(4, 60) for _ in range(length))
    return Request(RequestId(name), prompt, DecodingParams(Mode.AR, max_new_tokens=new, ignore_eos=True))


def _tokens(events: list[Event], name: str) -> list[int]:
    return [t for e in events if isinstance(e, BlockEvent) and e.request_id == name for t in e.token_ids]


def _decoded(name: str, request: Request) -> list[int]:
    """Alone."""
    events: list[Event] = []
    engine = ContextEngine(golden(name).context, SETTINGS, events.append)
    engine.add(request)
    while not any(isinstance(event, ReleasedEvent) for event in events):
        engine.tick()
    return _tokens(events, request.id)


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("want", [Want.HIDDEN, Want.STATES])
def test_a_pass_in_parts_has_the_same_bits(name: str, count: int, want: Want) -> None:
    tower = golden(name).context
    found = []
    for parts in (0, count):
        cache = TowerCache(tower.config, 2, 32, CPU, torch.float32)
        slots = [cache.allocate(100), cache.allocate(80)]
        tokens = [[4 + i % 50 for i in range(length)] for length in (100, 70)]
        passes = EagerPasses(tower, cache)
        out = list(passes.parts(slots, tokens, parts, want))[-1] if parts else passes.run(slots, tokens, want=want)
        found.append((out, cache.conv.clone(), cache.ssm.clone(), cache.keys.clone(), cache.values.clone()))
    assert all(torch.equal(whole, parted) for whole, parted in zip(*found, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_steps_come_between_the_parts_and_change_nothing(name: str) -> None:
    events: list[Event] = []
    engine = ContextEngine(golden(name).context, SETTINGS, events.append)
    running, long = _request("running", 5, 30), _request("long", 300)
    engine.add(running)
    for _ in range(5):
        engine.tick()
    engine.add(long)
    steps = []
    while not _tokens(events, "long"):
        before = len(_tokens(events, "running"))
        engine.tick()
        steps.append(len(_tokens(events, "running")) - before)
    assert steps == [0, 1] * (2 * PROMPT_PARTS) + [0], "two whole chunks in parts, and one of 44 tokens in one"
    while sum(isinstance(event, ReleasedEvent) for event in events) < 2:
        engine.tick()
    for request in (running, long):
        assert _tokens(events, request.id) == _decoded(name, request)


@pytest.mark.parametrize("ticks", range(1, 7))
def test_giving_up_between_two_parts_leaves_nothing_and_hurts_nobody(ticks: int) -> None:
    events: list[Event] = []
    engine = ContextEngine(golden(MODELS[0]).context, SETTINGS, events.append)
    long, beside = _request("long", 100), _request("beside", 28)  # one batch, which is read in parts
    engine.add(long)
    engine.add(beside)
    for _ in range(ticks):
        engine.tick()
    engine.cancel(long.id)
    next_tenant = _request("next", 90)
    engine.add(next_tenant)
    while sum(isinstance(event, ReleasedEvent) for event in events) < 3:
        engine.tick()
    assert [e.request_id for e in events if isinstance(e, ReleasedEvent)].count(long.id) == 1
    for request in (beside, next_tenant):
        assert _tokens(events, request.id) == _decoded(MODELS[0], request)
    stats = engine.stats(0.0)
    assert (stats.sequences, stats.free_slots, stats.free_pages) == (0, stats.total_slots, stats.total_pages)


def test_giving_up_a_score_with_its_last_part() -> None:
    """It ends with the part that its cancel has to wait for: once, not twice."""
    events: list[Event] = []
    engine = ContextEngine(golden(MODELS[0]).context, SETTINGS, events.append)
    engine.add(ScoreRequest(RequestId("score"), tuple(range(4, 60)) * 2, 100))
    engine.tick()
    engine.cancel(RequestId("score"))
    engine.tick()
    assert [type(event).__name__ for event in events] == ["ScoreEvent", "ReleasedEvent"]
