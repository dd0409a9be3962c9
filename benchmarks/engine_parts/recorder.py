"""What one tower process did when: its engine's ticks, the parts of a tick, and what crossed between the towers.

Wraps methods of the engine, its passes, its link and the decision from outside; the engine knows nothing of it. While
it is off, a wrapped call costs a tenth of a microsecond. Times are `time.monotonic`, one clock for all processes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from twotower.engine.context import decoding
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.modes import mock_ar
from twotower.exchange.protocol import Commit, Delta, Port

# A step is a denoiser's forward and decision, which may be one recorded program.
FORWARD, STEP, DECISION, EXCHANGE, DELIVERY = "forward", "step", "decision", "exchange", "delivery"
WRITING = "writing"  # of deltas, by the link's receiver thread


@dataclass(frozen=True, slots=True)
class Span:
    """Wall time of a part, and how much of it the engine's thread computed. `shape`: rows and width of a forward."""

    name: str
    start: float
    end: float
    cpu_s: float
    slots: tuple[int, ...] = ()
    width: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Tick:
    """One call of an engine's `tick`. `active`: sequences the engine knew at its end."""

    start: float
    end: float
    cpu_s: float
    worked: bool
    active: int
    rows: int

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Crossing:
    """A commit or its delta seen at one end; a sequence and the position it starts at name both."""

    what: str
    sequence: int
    start: int
    at: float


@dataclass
class Recording:
    """All that was seen while the recorder was on."""

    ticks: list[Tick] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    crossings: list[Crossing] = field(default_factory=list)


class Recorder:
    """Watches the engine of this process. Switch it on and off at any time."""

    def __init__(self) -> None:
        self._on = False
        self._seen = Recording()

    def switch(self, on: bool) -> Recording:
        """Start afresh, or stop. Returns what was seen until now."""
        seen, self._seen = self._seen, Recording()
        self._on = on
        return seen

    def attach(self, engine: ContextEngine | DenoiserEngine, runner: object) -> None:
        """Watch this engine, its passes and its decision, and the delivery of its events."""
        self._wrap_passes(engine._passes)
        self._wrap_tick(engine)
        self._wrap(runner, "_deliver", DELIVERY)
        if isinstance(engine, DenoiserEngine):
            self._wrap(mock_ar, "decide", DECISION)
            self._wrap(engine.link, "poll", EXCHANGE, self._polled)
            self._wrap(engine.link, "submit", EXCHANGE, self._submitted)
            if hasattr(engine.link, "_write_beside"):
                self._wrap(engine.link, "_write_beside", WRITING)
        else:
            self._wrap_passes(engine._eager)
            self._wrap_parts(engine._eager)
            self._wrap(decoding, "decide", DECISION)

    def attach_port(self, port: Port) -> None:
        self._wrap(port, "receive", EXCHANGE, self._received)
        self._wrap(port, "send", EXCHANGE, self._sent)

    def _wrap(
        self, owner: object, method: str, name: str, look: Callable[[Sequence[Any], Any, float], None] | None = None
    ) -> None:
        call = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return call(*args, **kwargs)
            start, cpu = time.monotonic(), time.thread_time()
            result = call(*args, **kwargs)
            end, cpu_s = time.monotonic(), time.thread_time() - cpu
            self._seen.spans.append(Span(name, start, end, cpu_s))
            if look is not None:
                look(args, result, end)
            return result

        setattr(owner, method, watched)

    def _wrap_passes(self, passes: Any) -> None:
        run, step = passes.run, passes.step

        def watched_run(slots: Sequence[int], tokens: Sequence[Sequence[int]], *rest: Any, **named: Any) -> Any:
            if not self._on:
                return run(slots, tokens, *rest, **named)
            return self._timed(FORWARD, slots, max(map(len, tokens)), lambda: run(slots, tokens, *rest, **named))

        def watched_step(slots: Sequence[int], blocks: Any) -> Any:
            if not self._on:
                return step(slots, blocks)
            passes.run = run  # a step that is not one program calls it
            try:
                return self._timed(STEP, slots, blocks.width, lambda: step(slots, blocks))
            finally:
                passes.run = watched_run

        passes.run, passes.step = watched_run, watched_step

    def _wrap_parts(self, passes: Any) -> None:
        parts = passes.parts

        def watched(slots: Sequence[int], tokens: Sequence[Sequence[int]], count: int, want: Any) -> Iterator[Any]:
            under_way: Iterator[Any] | None = None

            def part() -> Any:
                nonlocal under_way
                under_way = under_way or parts(slots, tokens, count, want)
                return next(under_way)

            for _ in range(count):
                yield self._timed(FORWARD, slots, max(map(len, tokens)), part) if self._on else part()

        passes.parts = watched

    def _timed(self, name: str, slots: Sequence[int], width: int, call: Callable[[], Any]) -> Any:
        start, cpu = time.monotonic(), time.thread_time()
        result = call()
        end, cpu_s = time.monotonic(), time.thread_time() - cpu
        self._seen.spans.append(Span(name, start, end, cpu_s, tuple(slots), width))
        return result

    def _wrap_tick(self, engine: ContextEngine | DenoiserEngine) -> None:
        tick = engine.tick

        def watched() -> bool:
            if not self._on:
                return tick()
            rows, start, cpu = engine.rows, time.monotonic(), time.thread_time()
            worked = tick()
            end, cpu_s = time.monotonic(), time.thread_time() - cpu
            active = engine.stats(0.0).sequences
            self._seen.ticks.append(Tick(start, end, cpu_s, worked, active, engine.rows - rows))
            return worked

        engine.tick = watched  # type: ignore[method-assign]

    def _submitted(self, args: Sequence[Any], _result: Any, at: float) -> None:
        self._crossed("submitted", args[0], Commit, at)

    def _received(self, _args: Sequence[Any], result: Any, at: float) -> None:
        self._crossed("received", result, Commit, at)

    def _sent(self, args: Sequence[Any], _result: Any, at: float) -> None:
        self._crossed("sent", args[0], Delta, at)

    def _polled(self, _args: Sequence[Any], result: Any, at: float) -> None:
        self._crossed("polled", result, Delta, at)

    def _crossed(self, what: str, messages: Sequence[Any], kind: type[Commit] | type[Delta], at: float) -> None:
        for message in messages:
            if isinstance(message, kind):
                self._seen.crossings.append(Crossing(what, message.sequence, message.start, at))
