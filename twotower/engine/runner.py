"""The thread that owns a device: ticks its engines, sleeps when they have no work, and passes their events on.

The only place where a thread and an event loop meet. Implements EngineHandle for the process it lives in.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from twotower.core import AnyRequest, BlockEvent, Event, ReleasedEvent, Request, RequestId, TraceEvent
from twotower.engine.free_memory import free_bytes
from twotower.engine.handle import EngineStats
from twotower.errors import TwoTowerError, Unavailable
from twotower.model.transfer import current

logger = logging.getLogger(__name__)

# Waking the event loop takes the interpreter from the engine for a good part of a small model's forward. While the
# engines are busy, only a request's first and last events wake the loop at once. Other events wake it no more often
# than this.
_DELIVER_S = 0.02
_CPU = torch.device("cpu")
_QUIET_S = 1.0  # `events` returns nothing after this time, which shows its caller that the process lives


Sink = Callable[[Sequence[Event], str | None], None]


class Engine(Protocol):
    """What a runner drives. Called from the runner's thread; `takes`, `add` and `cancel` from any thread."""

    def takes(self, request: AnyRequest) -> bool: ...
    def add(self, request: AnyRequest) -> None: ...
    def cancel(self, request_id: RequestId) -> None: ...
    def tick(self) -> bool: ...
    def close(self) -> None: ...
    def stats(self, busy_s: float) -> EngineStats: ...


class EngineRunner:
    """Runs engines on one thread. Give engines `runner.emit`, links and ports `runner.wake`; then `start`.

    An exception out of a tick is a bug or a broken device: the runner stops, and every later call raises Unavailable
    with the reason. So does a tick that takes longer than `stall_timeout_s`.
    """

    def __init__(self, stall_timeout_s: float = 60.0) -> None:
        self.engines: list[Engine] = []
        self._device = _CPU
        self._stall_timeout_s = stall_timeout_s
        self._wake = threading.Event()
        self._stopping = False
        self._failure: str | None = None
        self.error: Exception | None = None  # the error that ended it
        self._events: list[Event] = []
        # For causal requests, whose tokens may be merged: the place in `_events` of each one's newest block.
        self._joining: dict[RequestId, int | None] = {}
        self._lock = threading.Lock()
        self._ring: Callable[[], object] | None = None
        self._sink: Sink | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._busy_s = 0.0
        self._turn_started: float | None = None
        self._urgent = False
        self._delivered = 0.0
        self.turns = 0

    def start(self, engines: Sequence[Engine], device: torch.device = _CPU) -> None:
        """`device`: the engines' device."""
        self.engines, self._device = list(engines), device
        self._thread.start()

    def wake(self) -> None:
        """Something may have arrived: look again. From any thread."""
        self._wake.set()

    def emit(self, event: Event) -> None:
        """Pass an event to the caller of `events`. From the runner's thread.

        Tokens of `ar` and `mock_ar` that have not been fetched yet are merged, which saves work on their way.
        """
        with self._lock:
            self._append(event)
            if not isinstance(event, ReleasedEvent | TraceEvent):
                first_or_last = not isinstance(event, BlockEvent) or event.start == 0 or event.is_last
                self._urgent = self._urgent or first_or_last

    def _append(self, event: Event) -> None:
        if event.request_id in self._joining:
            if isinstance(event, BlockEvent):
                place = self._joining[event.request_id]
                if place is not None:
                    waiting = self._events[place]
                    assert isinstance(waiting, BlockEvent)
                    self._events[place] = waiting.joined(event)
                    return
                self._joining[event.request_id] = len(self._events)
            elif isinstance(event, ReleasedEvent):
                del self._joining[event.request_id]
        self._events.append(event)

    def progress(self) -> int:
        """Turns so far: grows at least once a second while the engines live, stands still while a tick hangs."""
        return self.turns

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after its current tick and close the engines."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def ended(self, within_s: float) -> bool:
        """Whether the thread has ended, waiting at most so many seconds."""
        if self._thread.ident is not None:
            self._thread.join(within_s)
        return not self._thread.is_alive()

    def add(self, requests: Sequence[AnyRequest]) -> None:
        self.check()
        for request in requests:
            engine = self._engine_for(request)
            if isinstance(request, Request) and request.params.mode.by_token:
                with self._lock:
                    self._joining[request.id] = None
            engine.add(request)
        self._wake.set()

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        self.check()
        for request_id in request_ids:
            for engine in self.engines:
                engine.cancel(request_id)
        self._wake.set()

    def push_to(self, sink: Sink) -> None:
        """Hand events to `sink` as they happen, on the runner's thread, instead of keeping them for `events`.

        The last call has the reason why the runner has ended.
        """
        self._sink = sink
        self._wake.set()

    async def events(self) -> list[Event]:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[None] = loop.create_future()
        with self._lock:
            if self._events:
                return self._take_events()
            self._ring = partial(loop.call_soon_threadsafe, _resolve, arrived)
        quiet = loop.call_later(_QUIET_S, _resolve, arrived)
        try:
            await arrived
        finally:
            quiet.cancel()
        with self._lock:
            events = self._take_events()
        if not events:
            self.check()
        return events

    def _take_events(self) -> list[Event]:
        events, self._events, self._ring, self._urgent = self._events, [], None, False
        self._joining = dict.fromkeys(self._joining)
        return events

    async def stats(self) -> list[EngineStats]:
        self.check()
        here = partial(replace, free_memory=free_bytes(self._device), process=os.getpid())
        return [here(engine.stats(self._busy_s)) for engine in self.engines]

    def _engine_for(self, request: AnyRequest) -> Engine:
        for engine in self.engines:
            if engine.takes(request):
                return engine
        tower = "denoiser" if request.needs_denoiser else "context"
        raise Unavailable(f"no engine here takes request {request.id}, wanted one of a {tower} tower")

    def check(self) -> None:
        """Raises Unavailable if the engines have ended or hang."""
        if self._failure is not None:
            raise Unavailable(self._failure)
        started = self._turn_started
        if started is not None and time.monotonic() - started > self._stall_timeout_s:
            raise Unavailable(f"the engine has been in one tick for more than {self._stall_timeout_s:g} s")

    def _run(self) -> None:
        try:
            with current(self._device), torch.inference_mode():
                while not self._stopping:
                    self._turn()
        except Exception as error:
            self.error, self._failure = error, _reason(error)
        finally:
            if self._failure is None:
                self._failure = "the engine was stopped"
            self._deliver()  # before the engines close, which may take a while
            for engine in self.engines:
                engine.close()

    def _turn(self) -> None:
        self._wake.clear()
        started = self._turn_started = time.monotonic()
        worked = False
        for engine in self.engines:
            worked = engine.tick() or worked
        self._turn_started = None
        self.turns += 1
        now = time.monotonic()
        if self._urgent or not worked or now - self._delivered > _DELIVER_S:
            self._deliver()
            self._delivered = now
        if worked:
            self._busy_s += now - started
        else:
            self._wake.wait(_QUIET_S)

    def _deliver(self) -> None:
        if self._sink is not None:
            with self._lock:
                events = self._take_events()
            if events or self._failure is not None:
                self._sink(events, self._failure)
            return
        with self._lock:
            ring = self._ring if self._events or self._failure else None
            if ring is not None:
                self._ring = None
        if ring is not None:
            try:
                ring()
            except RuntimeError:
                # The waiting event loop is closed: there is no caller left.
                logger.debug("events for a closed event loop")


def _resolve(arrived: "asyncio.Future[None]") -> None:
    if not arrived.done():
        arrived.set_result(None)


def _reason(error: Exception) -> str:
    """The reason for callers. One of our errors explains itself; any other error goes to the log with its traceback."""
    if isinstance(error, TwoTowerError):
        logger.error("engine thread ended: %s", error)
        return str(error)
    logger.exception("engine thread ended")
    return f"the engine stopped ({type(error).__name__}); its log says why"
