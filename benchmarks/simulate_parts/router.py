"""A router: the product's admission, turns, runs and lines, over Serve's handle; its interpreter is one `Processor`."""

import asyncio
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

from benchmarks.simulate_parts.cell import FINGERPRINT, VOCABULARY
from benchmarks.simulate_parts.device import Processor
from benchmarks.simulate_parts.lengths import Asked
from benchmarks.simulate_parts.serve import Handle, Lines, Pace
from cluster.config import ServiceConfig
from cluster.readiness import Readiness
from cluster.router import admission, turns
from cluster.runs.callers import Caller
from cluster.runs.cell_lines import CellLines
from cluster.runs.deadline import Deadline
from cluster.runs.messages import Waits
from cluster.runs.observers import Observer
from cluster.runs.record import Record
from cluster.runs.remote_cells import RemoteCells
from cluster.runs.run import Means, Patience, Run
from twotower.core import BlockEvent, DecodingParams, Mode, Request, RequestId
from twotower.errors import TwoTowerError
from twotower.transport.handshake import Address


@dataclass(frozen=True, slots=True)
class RouterCosts:
    """Seconds of a router's interpreter: of a request, of each event of its answer, and of what it does once that is
    over. `beside_s`: what a request waits for besides, and nobody computes."""

    request_s: float = 0.0
    event_s: float = 0.0
    after_s: float = 0.0
    beside_s: float = 0.0


class VirtualDeadline(Deadline):
    """On the loop's clock."""

    def left_s(self) -> float:
        left = self.ends_at - asyncio.get_running_loop().time()
        if left <= 0:
            raise self.passed()
        return left


@dataclass(slots=True)
class Outcome:
    """What a client saw. Times are the loop's; `error`: the class of what ended it."""

    due: float
    tokens: int = 0
    first: float | None = None
    end: float = 0.0
    gap_s: float = 0.0
    error: str | None = None
    moves: int = 0
    resumes: int = 0

    @property
    def latency_s(self) -> float:
        return self.end - self.due


@dataclass(slots=True)
class _Counting(Observer):
    """Of one run."""

    outcome: Outcome

    def handed_over(self, record: Record) -> None:
        self.outcome.moves += 1

    def resumed(self, record: Record, error: TwoTowerError) -> None:
        self.outcome.resumes += 1


@dataclass(slots=True)
class Book:
    """What becomes of each request, for cells: by its id."""

    asked: dict[str, Asked] = field(default_factory=dict)

    def of(self, request_id: RequestId) -> Asked:
        return self.asked[request_id.partition("~")[0]]


class SimRouter:
    """`cluster.router.Router` without faces, metrics and sockets."""

    def __init__(
        self, number: int, config: ServiceConfig, pace: Pace, costs: RouterCosts, book: Book, random: Random
    ) -> None:
        loop = asyncio.get_running_loop()
        self._loop, self._config, self._costs, self._book = loop, config, costs, book
        self.lines = CellLines()
        self.lines.address = Address(f"router{number}", 1, "")
        connection: Any = SimpleNamespace(is_late=False, close=lambda: None)
        self.lines_to = Lines(lambda: self.lines._accept(connection, {})[0], pace.hop_s)
        self.handle = Handle(self.lines_to, pace.hop_s)
        handle: Any = self.handle
        self._cells = RemoteCells(handle, self.lines)
        self.admission = admission(config, loop.time)
        self.turns = turns(config, self.lines, loop.time)
        self.lines.on_beat, self.lines.waits = self.turns.grant, self.turns.waits
        self._patience = Patience(config.cluster.max_resumes, config.cluster.queue_timeout_s)
        self._readiness = Readiness(self._cells)
        self.processor = Processor(loop)
        self.waits_said = Waits(0, 0.0)
        loop.call_later(random.random(), self._say)
        self.watching = loop.create_task(self._watch(random.random()))

    async def _watch(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self._readiness.watch()

    def _say(self) -> None:
        self.waits_said = self.turns.waits()
        self._loop.call_later(1.0, self._say)

    async def ask(self, name: str, asked: Asked, caller: Caller, most_tokens: int) -> Outcome:
        """One request of a client, from when it is there."""
        outcome = Outcome(self._loop.time())
        self._book.asked[name] = asked
        try:
            await self.processor.use(self._costs.request_s)
            if self._costs.beside_s:
                await asyncio.sleep(self._costs.beside_s)
            with self.admission.hold(1, caller):
                await self._answer(Request(
                    RequestId(name), _tokens(asked.prompt), DecodingParams(Mode.DIFFUSION, max_new_tokens=most_tokens)
                ), caller, outcome)  # fmt: skip
        except TwoTowerError as error:
            outcome.error = type(error).__name__
        finally:
            outcome.end = self._loop.time()
            self.processor.add(self._costs.after_s)
            del self._book.asked[name]
        return outcome

    async def _answer(self, request: Request, caller: Caller, outcome: Outcome) -> None:
        limit_s = self._config.ingress.request_timeout_s
        deadline = VirtualDeadline(limit_s, self._loop.time() + limit_s)
        means = Means(self._cells, self._patience, (_Counting(outcome),), self.turns)
        run = Run(Record(request, FINGERPRINT, vocabulary=VOCABULARY, caller=caller), deadline, means)
        before = None
        try:
            while True:
                event = await run.event()
                await self.processor.use(self._costs.event_s)
                now = self._loop.time()
                outcome.first = now if outcome.first is None else outcome.first
                outcome.gap_s = max(outcome.gap_s, now - before) if before is not None else 0.0
                before = now
                assert isinstance(event, BlockEvent)
                outcome.tokens += len(event.token_ids)
                if event.is_last:
                    return
        finally:
            await run.close()


_PROMPTS: dict[int, tuple[int, ...]] = {}


def _tokens(count: int) -> tuple[int, ...]:
    """Prompts of one length are one object: what is in them does not matter."""
    if count not in _PROMPTS:
        _PROMPTS[count] = (0,) * count
    return _PROMPTS[count]
