"""A cell: the product's ledger and the product's scheduler of its context tower, over passes that only take time.

A request is rows of blocks: its prompt is read, a block takes some denoiser steps, the context tower reads it, and so
on. The last block of `diffusion` is not read. What is not here: weights, tokens, and the modes that write one token at
a time.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from benchmarks.simulate_parts.costs import PassCosts
from benchmarks.simulate_parts.device import Device, Work
from benchmarks.simulate_parts.lengths import BLOCK, Asked
from cluster.config import ServiceConfig
from cluster.runs.messages import Beat, Block, Failed, Message, Placed, Waits
from cluster.scaling import Meter
from twotower.core import AnyRequest, BlockEvent, FailureEvent, FinishReason, Mode, Request, RequestId
from twotower.engine.ledger import Ledger
from twotower.engine.scheduler import CommitBatch, ContextScheduler, PrefillBatch
from twotower.errors import Overloaded, TwoTowerError, Unavailable
from twotower.model.room import Room

FINGERPRINT, VOCABULARY = "0123456789abcdef", "fedcba9876543210"
Tell = Callable[[Message], None]


@dataclass(slots=True, eq=False)
class _Row:
    """A sequence. `start`: tokens that are told. `left`: steps of its block that are to be made."""

    request: Request
    call: int
    tell: Tell
    over: "asyncio.Future[None]"
    asked: Asked
    start: int
    block: int
    left: int = 0
    ready: bool = False
    denoiser: int = 0


class SimCell:
    """`denoisers` 0: both towers on one device, in turn; else the context tower on one and each denoiser on its own."""

    def __init__(
        self,
        name: str,
        config: ServiceConfig,
        costs: PassCosts,
        answers: Callable[[RequestId], Asked],
        denoisers: int = 0,
        knows: tuple[str, ...] = (),
        fingerprint: str = FINGERPRINT,
    ) -> None:
        """`answers`: what becomes of a request, which the model would decide."""
        engine, self._loop = config.engine, asyncio.get_running_loop()
        self.name, self._costs, self._answers, self._knows = name, costs, answers, knows
        self.fingerprint = fingerprint
        self.most_ongoing = engine.max_sequences + engine.max_queued_requests + 16
        rooms = [Room(engine.max_sequences, engine.pages) for _ in range(1 + denoisers)]
        self.ledger = Ledger(rooms[0], rooms[1:], engine.max_queued_requests)
        self._chunk = engine.prefill_chunk_tokens
        self._scheduler = ContextScheduler(self._chunk)
        self._rows: dict[RequestId, _Row] = {}
        self._waiting: dict[RequestId, _Row] = {}
        self._ready: list[dict[RequestId, _Row]] = [{} for _ in range(max(1, denoisers))]
        self._context_first = True
        self._colocated = denoisers == 0
        if self._colocated:
            self._context = both = Device(self._loop, self._either)
            self._denoisers = [both]
        else:
            self._context = Device(self._loop, self._read)
            self._denoisers = [Device(self._loop, lambda place=place: self._step(place)) for place in range(denoisers)]
        self._meter = Meter(self._loop.time)
        self.alive, self.draining = True, False
        self.row_passes = self.steps = 0.0  # of denoisers: rows over all passes, and passes
        self.finished = 0

    @property
    def held(self) -> int:
        """Requests that run or wait here."""
        return len(self._rows) + len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def devices(self) -> Sequence[Device]:
        return (self._context,) if self._colocated else (self._context, *self._denoisers)

    def begin(self, request: AnyRequest, call: int, tell: Tell) -> "asyncio.Future[None]":
        """Take a call; the future ends with it."""
        assert isinstance(request, Request)
        over = self._loop.create_future()
        tell(Placed(call, self.name, self.fingerprint, VOCABULARY, self._knows))
        asked, told = self._answers(request.id), len(request.committed)
        row = _Row(request, call, tell, over, asked, told, told // BLOCK)
        try:
            self.ledger.enqueue(request)
        except Overloaded as error:
            self._fail(row, error)
            return over
        self._waiting[request.id] = row
        self._admit()
        return over

    def abandon(self, request_id: RequestId) -> None:
        """Nobody wants it any more."""
        if self._waiting.pop(request_id, None) is not None:
            self.ledger.withdraw(request_id)
            self._admit()
        elif request_id in self._rows:
            self._forget(self._rows[request_id])

    def kill(self) -> None:
        """All of it is gone at once; nobody is told."""
        self.alive = False
        for device in {*self.devices}:
            device.stop()

    def beat(self) -> Beat:
        ledger = self.ledger
        slots = ledger.running + ledger.context.free_slots
        return Beat(self.name, self.fingerprint, (Mode.DIFFUSION, Mode.VERIFIED), ledger.running, ledger.waiting, slots)

    async def load(self, waits: Sequence[Waits]) -> dict[str, float]:
        """What the product's meter tells Serve's controller."""
        room = self.ledger.context

        async def stats() -> Any:
            return [
                SimpleNamespace(busy_s=device.busy_s, free_pages=room.free_pages, total_pages=room.pages)
                for device in self.devices
            ]

        return await self._meter.read(self.ledger, stats, waits)

    def fail_all(self, error: TwoTowerError) -> None:
        """Its time to drain is over."""
        for row in [*self._waiting.values()]:
            del self._waiting[row.request.id]
            self.ledger.withdraw(row.request.id)
            self._fail(row, error)
        for row in [*self._rows.values()]:
            self._forget(row)
            self._fail(row, error)

    def _fail(self, row: _Row, error: TwoTowerError) -> None:
        row.tell(Failed(row.call, FailureEvent(row.request.id, error)))
        if not row.over.done():
            row.over.set_result(None)

    def _admit(self) -> None:
        for request, place in self.ledger.admit():
            row = self._waiting.pop(request.id)
            row.denoiser = place.denoiser or 0
            self._rows[request.id] = row
            length = row.asked.prompt + row.start
            if length and self._chunk:
                self._scheduler.add_prompt(request.id, 0, length)
            self._context.poke()

    def _forget(self, row: _Row) -> None:
        name = row.request.id
        del self._rows[name]
        self._ready[row.denoiser].pop(name, None)
        self._scheduler.drop(name)
        self.ledger.release(name)
        self._admit()

    def _either(self) -> Work | None:
        """Of one device: the context tower's next batch, then a step of all that are ready, in turn."""
        first, then = (self._read, self._step) if self._context_first else (self._step, self._read)
        work = first()
        if work is not None:
            self._context_first = first != self._read
            return work
        self._context_first = then != self._read
        return then()

    def _read(self) -> Work | None:
        work = self._scheduler.next()
        if isinstance(work, CommitBatch):
            keys = work.keys
            return Work(self._costs.read(len(keys)), 1, lambda count: self._has_read(keys))
        if isinstance(work, PrefillBatch):
            width = max(chunk.end - chunk.start for chunk in work.chunks)
            return Work(self._costs.prompt(len(work.chunks), width), 1, lambda count: self._has_begun(work))
        return None

    def _has_begun(self, batch: PrefillBatch) -> None:
        self._scheduler.has_read()
        for chunk in batch.chunks:
            row = self._rows.get(chunk.key)  # type: ignore[call-overload]
            if row is not None and chunk.end == row.asked.prompt + row.start:
                self._is_ready(row)

    def _has_read(self, keys: Sequence[Any]) -> None:
        for key in keys:
            row = self._rows.get(key)
            if row is None:
                continue
            if self._colocated:
                self._is_ready(row)
            else:
                self._loop.call_later(self._costs.carried(), self._arrived, row)

    def _arrived(self, row: _Row) -> None:
        if self.alive and self._rows.get(row.request.id) is row:
            self._is_ready(row)

    def _is_ready(self, row: _Row) -> None:
        row.left = row.asked.steps[row.block]
        self._ready[row.denoiser][row.request.id] = row
        self._denoisers[row.denoiser].poke()

    def _step(self, place: int = 0) -> Work | None:
        ready = self._ready[place]
        if not ready:
            return None
        rows = list(ready.values())
        steps = min(row.left for row in rows)
        return Work(self._costs.step(len(rows)), steps, lambda count: self._has_stepped(rows, count))

    def _has_stepped(self, rows: Sequence[_Row], count: int) -> None:
        self.row_passes += len(rows) * count
        self.steps += count
        for row in rows:
            if self._rows.get(row.request.id) is not row:
                continue
            row.left -= count
            if not row.left:
                self._block_is_full(row)

    def _block_is_full(self, row: _Row) -> None:
        name, tokens = row.request.id, min(BLOCK, row.asked.answer - row.start)
        del self._ready[row.denoiser][name]
        last = row.start + tokens >= row.asked.answer
        reason = FinishReason.LENGTH if last else None
        event = BlockEvent(name, row.start, (0,) * tokens, row.asked.steps[row.block], 1, reason)
        row.start += tokens
        row.block += 1
        row.tell(Block(row.call, event))
        if last:
            self.finished += 1
            self._forget(row)
            if not row.over.done():
                row.over.set_result(None)
        else:
            self._scheduler.add_commit(name, BLOCK)
            self._context.poke()


def gone(cell: str) -> Unavailable:
    return Unavailable(f"the cell {cell} that served this request is gone")
