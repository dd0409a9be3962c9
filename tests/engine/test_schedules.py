"""Two thousand random schedules against scripted towers: no leak, no starvation, order holds, tokens and scores are
right.

Each schedule has one simulated cell: a ledger, a context engine, and one or more denoiser engines. Their exchanges are
in place, or, in some schedules, those of processes: mirrors, payloads, threads. Who ticks when, who arrives when, who
gives up when and whose logits are not finite is drawn at random.
"""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch

from twotower.core import (
    AnyRequest,
    BlockEvent,
    DecodingParams,
    Event,
    FailureEvent,
    FinishReason,
    Mode,
    ReleasedEvent,
    Request,
    RequestId,
    ScoreEvent,
    ScoreRequest,
)
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.ledger import Ledger, Place
from twotower.engine.settings import EngineSettings
from twotower.errors import NumericalError, Overloaded
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.local import LocalExchange
from twotower.exchange.protocol import Link, Port
from twotower.exchange.settings import LinkSettings
from twotower.model.cache import TowerCache
from twotower.model.room import Room
from twotower.testing import ScriptedContextTower, ScriptedDenoiserTower, scripted_scores, scripted_tokens
from twotower.testing.towers import VOCAB

SCHEDULES = 2040
BATCHES, USUAL_BATCHES = 17, 6  # the others are long
MIRRORED, MIRRORED_BATCHES = 60, 3  # further ones over the exchange of processes
MAX_TICKS = 3000  # far more than any schedule needs: reaching it is starvation


def _request(number: int, draw: random.Random) -> AnyRequest:
    if draw.random() < 0.2:
        return _score_request(number, draw)
    mode = draw.choice(list(Mode))
    params = DecodingParams(
        mode=mode,
        max_new_tokens=draw.randint(1, 30),
        block_size=draw.choice([1, 3, 8, 16, 40]),
        steps_per_block=draw.randint(1, 9),
        confidence_threshold=draw.choice([0.0, 0.5, 0.9, 1.0]),
        stop_token_ids=tuple(draw.sample(range(4, VOCAB), draw.choice([0, 0, 1]))),
    )
    prompt = tuple(draw.randrange(4, VOCAB) for _ in range(draw.randint(1, 40)))
    return Request(RequestId(f"r{number}"), prompt, params, draw.choice([0, 0, 0, -1, 1, 7]))


def _alike(requests: Sequence[AnyRequest], draw: random.Random) -> list[AnyRequest]:
    """Rows that fill their blocks in step."""
    size, steps = draw.choice([3, 8, 16, 40]), draw.randint(1, 3)
    params = DecodingParams(Mode.DIFFUSION, 90, block_size=size, steps_per_block=steps, confidence_threshold=1.0)
    return [replace(r, params=params) if isinstance(r, Request) else r for r in requests]


def _begin_alike(requests: Sequence[AnyRequest], draw: random.Random) -> list[AnyRequest]:
    """Prompts that have their first tokens in common: some of these few, cut anywhere."""
    bases = [tuple(draw.randrange(4, VOCAB) for _ in range(draw.randint(1, 100))) for _ in range(draw.randint(1, 2))]
    return [_behind(r, draw.choice(bases)[: draw.randint(0, 100)], draw) for r in requests]


def _behind(request: AnyRequest, first: tuple[int, ...], draw: random.Random) -> AnyRequest:
    if isinstance(request, Request):
        return replace(request, prompt_token_ids=first + request.prompt_token_ids[: draw.choice([1, 40])])
    start = request.start + draw.choice([0, len(first)])
    return replace(request, token_ids=first + request.token_ids, start=start)


def _score_request(number: int, draw: random.Random) -> ScoreRequest:
    """Some of its tokens are what the tower itself says."""
    prompt = tuple(draw.randrange(4, VOCAB) for _ in range(draw.randint(1, 40)))
    spoken = Request(RequestId("spoken"), prompt, DecodingParams(Mode.AR, max_new_tokens=draw.randint(1, 20)))
    more = tuple(draw.randrange(4, VOCAB) for _ in range(draw.randint(0, 20)))
    tokens = prompt + tuple(scripted_tokens(spoken)) + more
    return ScoreRequest(RequestId(f"s{number}"), tokens, draw.randrange(1, len(tokens)), draw.choice([0, 0, -1, 7]))


@dataclass
class Seen:
    """What a client of one request got."""

    scores: ScoreEvent | None = None
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    failed: bool = False
    released: int = 0


class _Failing:
    """A tower whose logits of some row now and then hold a NaN."""

    draw: random.Random
    failures = 0.0

    def logits(self, hidden_RLD: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden_RLD)  # type: ignore[misc]
        if self.draw.random() < self.failures:
            logits[self.draw.randrange(len(logits))] = float("nan")
        return cast(torch.Tensor, logits)


class _Context(_Failing, ScriptedContextTower):
    pass


class _Denoiser(_Failing, ScriptedDenoiserTower):
    pass


class SimulatedCell:
    """Engines, ledger and clients of one schedule. `mirrored`: over the exchange of processes."""

    def __init__(self, draw: random.Random, mirrored: bool, closing: ExitStack) -> None:
        self.draw, self.mirrored = draw, mirrored
        failures = draw.choice([0.0, 0.02, 0.02])
        slots, pages = draw.randint(1, 6), draw.randint(5, 24)
        settings = EngineSettings(
            max_sequences=slots,
            cache_tokens=pages * 16,
            prefill_chunk_tokens=draw.choice([4, 16, 64]),
            max_queued_requests=draw.choice([2, 50]),
            capture="off",
            prefix_cache_bytes=draw.choice([0, 1, 1]),  # the scripted tower has no states: any number is enough
        )
        self.events: list[Event] = []
        self.context = ContextEngine(cast(Any, self._tower(_Context, failures)), settings, self.events.append)
        self.denoisers = []
        for number in range(draw.choice([1, 2] if mirrored else [1, 1, 2, 3])):
            link = self._mirror(number, settings, closing) if mirrored else self._in_place()
            tower = cast(Any, self._tower(_Denoiser, failures))
            self.denoisers.append(DenoiserEngine(tower, link, settings, self.events.append))
        self.max_passed = draw.choice([1, 2, 64])
        # Mirrors share nothing, and this ledger has none: then nothing may count on what is shared.
        stride = 0 if mirrored else settings.prefix_stride
        self.ledger = Ledger(Room(slots, pages), [], settings.max_queued_requests, self.max_passed, stride)
        del self.context.prefixes._free[draw.choice([1, 2, 99]) :]
        self.priorities: dict[RequestId, int] = {}
        self.seen: dict[RequestId, Seen] = defaultdict(Seen)
        self.home: dict[RequestId, ContextEngine | DenoiserEngine] = {}
        self.started: list[RequestId] = []
        self.queued: list[RequestId] = []
        self.cancelled: set[RequestId] = set()
        self.paces = draw.choice([(2, 1), (1, 1), (1, 4)])  # how often the context engine ticks, and each denoiser's
        self.halved = 0  # commit batches that were read in halves

    def _tower(self, kind: type[_Failing], failures: float) -> _Failing:
        tower = kind()
        tower.draw, tower.failures = self.draw, failures
        return tower

    def _in_place(self) -> Link:
        exchange = LocalExchange(self.context.cache, lambda: None)
        cast(Port, exchange.port).apart = self.draw.choice([False, True])
        self.context.connect(exchange.port)
        return exchange.link

    def _mirror(self, number: int, settings: EngineSettings, closing: ExitStack) -> Link:
        patience = LinkSettings(staging_bytes=1 << 12, staging_buffers=self.draw.choice([1, 2, 3]))
        port, address = open_port(self.context.cache, number, 0, patience)
        self.context.connect(port)
        device, dtype = torch.device("cpu"), torch.float32
        mirror = TowerCache(ScriptedContextTower.config, settings.max_sequences, settings.pages, device, dtype)
        link = connect(address, mirror)
        closing.callback(port.close)
        closing.callback(link.close)
        return link

    def arrive(self, request: AnyRequest) -> bool:
        try:
            self.ledger.enqueue(request)
        except Overloaded:
            return False
        self.queued.append(request.id)
        self.priorities[request.id] = request.priority
        self.admit()
        return True

    def admit(self) -> None:
        for request, place in self.ledger.admit():
            self.started.append(request.id)
            engine = self._engine(request, place)
            self.home[request.id] = engine
            engine.add(request)

    def _engine(self, request: AnyRequest, place: Place) -> ContextEngine | DenoiserEngine:
        return self.context if place.denoiser is None else self.draw.choice(self.denoisers)

    def cancel(self, request_id: RequestId) -> None:
        self.cancelled.add(request_id)
        if not self.ledger.withdraw(request_id):
            self.home[request_id].cancel(request_id)
        else:
            self.queued.remove(request_id)

    def tick(self) -> None:
        engine = self.draw.choice([self.context] * self.paces[0] + self.denoisers * self.paces[1])
        before = self.context._scheduler._halved
        engine.tick()
        self.halved += not before and self.context._scheduler._halved
        if self.mirrored:
            time.sleep(0.0002)  # what is on its way has threads to run
        for event in self.events:
            self._take(event)
        self.events.clear()
        self.admit()

    def _take(self, event: Event) -> None:
        seen = self.seen[event.request_id]
        assert not seen.released, "an event after the release"
        assert not seen.failed or isinstance(event, ReleasedEvent), "an event after the failure"
        if isinstance(event, FailureEvent):
            assert isinstance(event.error, NumericalError), event
            seen.failed = True
        if isinstance(event, ReleasedEvent):
            seen.released += 1
            self.ledger.release(event.request_id)
        elif isinstance(event, ScoreEvent):
            assert seen.scores is None, "scored twice"
            seen.scores = event
        elif isinstance(event, BlockEvent):
            assert seen.finish is None, "an event after the finish"
            assert event.start == len(seen.tokens), "out of order"
            seen.tokens += event.token_ids
            seen.finish = event.finish_reason

    def open(self) -> list[RequestId]:
        return [r for r in self.queued if not self.seen[r].released]


def _play(seed: int, mirrored: bool = False) -> Counter[str]:
    """One schedule. Returns how many requests finished, were cancelled in time, and failed, `halved`, and how many
    prompts began with a kept prefix, and prefixes gave way."""
    with ExitStack() as closing:
        return _played(seed, random.Random(seed), mirrored, closing)


def _played(seed: int, draw: random.Random, mirrored: bool, closing: ExitStack) -> Counter[str]:
    cell = SimulatedCell(draw, mirrored, closing)
    requests = [_request(n, draw) for n in range(draw.randint(1, 12))]
    if draw.random() < 0.6:
        requests = _alike(requests, draw)
    if draw.random() < 0.8:
        requests = _begin_alike(requests, draw)
    biggest = 16 * cell.ledger.context.free_pages
    waiting = [r for r in requests if r.positions <= biggest]
    asked = {r.id: r for r in waiting}
    order = [r.id for r in waiting]
    for _ in range(MAX_TICKS * (10 if mirrored else 1)):
        if waiting and draw.random() < 0.3:
            request = waiting.pop(0)
            if not cell.arrive(request):
                order.remove(request.id)
                waiting.append(replace(request, id=RequestId(request.id + "+")))
                order.append(waiting[-1].id)
                asked[waiting[-1].id] = waiting[-1]
        elif cell.open() and draw.random() < (0.01 if mirrored else 0.02):  # those take more ticks
            cell.cancel(draw.choice(cell.open()))
        cell.tick()
        if not waiting and not cell.open():
            break
    else:
        pytest.fail(f"schedule {seed}: starved: {cell.open()} of {len(requests)}")
    _nothing_is_left(cell, seed)
    _order_holds([r for r in order if r in cell.started], cell, seed)
    for request_id in cell.started:
        request, seen = asked[request_id], cell.seen[request_id]
        done = seen.scores is not None or seen.finish is not None
        assert done or seen.failed or request_id in cell.cancelled
        if isinstance(request, Request):
            tokens = scripted_tokens(request)
            assert (tokens if done else tokens[: len(seen.tokens)]) == seen.tokens, f"schedule {seed}, {request_id}"
        elif seen.scores is not None:
            _scores_are_right(request, seen.scores, seed)
    finished = sum(s.scores is not None or s.finish is not None for s in cell.seen.values())
    failed = sum(s.failed for s in cell.seen.values())
    hits, evicted = cell.context.prefixes.hits, cell.context.prefixes.evictions
    counts = {"finished": finished, "cancelled": len(cell.cancelled), "failed": failed, "halved": cell.halved}
    return Counter(**counts, hits=hits, evicted=evicted)


def _scores_are_right(request: ScoreRequest, event: ScoreEvent, seed: int) -> None:
    wanted = scripted_scores(request)
    assert event.is_greedy == tuple(is_greedy for _, is_greedy in wanted), f"schedule {seed}, {request.id}"
    assert event.log_probs == pytest.approx([log_prob for log_prob, _ in wanted], abs=1e-5), f"schedule {seed}"


def _order_holds(arrived: list[RequestId], cell: SimulatedCell, seed: int) -> None:
    """Whoever started before an earlier request was more urgent, and not more than `max_passed` did so to one."""
    place = {request_id: number for number, request_id in enumerate(cell.started)}
    for number, earlier in enumerate(arrived):
        passing = [later for later in arrived[number + 1 :] if place[later] < place[earlier]]
        assert all(cell.priorities[later] < cell.priorities[earlier] for later in passing), f"schedule {seed}"
        assert len(passing) <= cell.max_passed, f"schedule {seed}: {earlier} was passed by {passing}"


def _nothing_is_left(cell: SimulatedCell, seed: int) -> None:
    for stats in [cell.context.stats(0.0), *(d.stats(0.0) for d in cell.denoisers)]:
        held = (stats.sequences, stats.total_slots - stats.free_slots, stats.total_pages - stats.free_pages)
        assert held == (0, 0, 0), f"schedule {seed}: {stats.tower} still holds {held}"
    assert (cell.ledger.running, cell.ledger.waiting) == (0, 0), f"schedule {seed}"


def _long(batches: Sequence[int]) -> list[Any]:
    return [pytest.param(batch, marks=pytest.mark.long) for batch in batches]


@pytest.mark.parametrize("batch", [*range(USUAL_BATCHES), *_long(range(USUAL_BATCHES, BATCHES))])
@pytest.mark.slow
def test_random_schedules(batch: int) -> None:
    seen: Counter[str] = Counter()
    per_batch = SCHEDULES // BATCHES
    with torch.inference_mode():
        for seed in range(batch * per_batch, (batch + 1) * per_batch):
            seen += _play(seed)
    assert seen["finished"] > 2 * per_batch
    assert seen["cancelled"] > per_batch // 20, "too few cancellations to show anything"
    assert seen["failed"] > per_batch // 20, "too few failures to show anything"
    assert seen["halved"] > per_batch // 20, "too few batches in halves to show anything"
    assert seen["hits"] > per_batch // 4 and seen["evicted"] > per_batch // 20, "too few prefixes to show anything"


@pytest.mark.parametrize("batch", range(MIRRORED_BATCHES))
@pytest.mark.slow
def test_random_schedules_over_mirrors(batch: int) -> None:
    seen: Counter[str] = Counter()
    per_batch = MIRRORED // MIRRORED_BATCHES
    first = SCHEDULES + batch * per_batch
    with torch.inference_mode():
        for seed in range(first, first + per_batch):
            seen += _play(seed, mirrored=True)
    assert seen["finished"] > 2 * per_batch and seen["cancelled"] > 1 and seen["failed"] > 1, seen
