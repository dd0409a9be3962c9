"""A trace of each request: an observer of runs that makes OpenTelemetry's spans.

    request ─┬─ queue      until a cell has taken it; again after each loss of a cell
             └─ attempt ── block …    its stay on one cell; links to the attempt before it

A `block` ends with its event and begins with the event before it: the first one includes the reading of the prompt.
Only blocks of `diffusion` and rounds of `verified` have spans; in a long answer only the first ones.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.runs.answer import Usage
from cluster.runs.observers import Observer
from cluster.runs.record import Record
from cluster.watch.words import code_of_end, mode_of
from twotower.core import AnswerEvent, BlockEvent, Mode, Request, RequestId, ScoreRequest
from twotower.errors import TwoTowerError

MOST_BLOCKS = 256
_SPANNED = (Mode.DIFFUSION, Mode.VERIFIED, Mode.AUTO)
Attributes = dict[str, str | int | Sequence[str]]
_W3C = TraceContextTextMapPropagator()


@dataclass(slots=True)
class _Traced:
    """The open spans of a run; `last`: the time of its last event, or when its cell took it."""

    request: Span
    queue: Span | None
    last: int
    attempt: Span | None = None
    before: SpanContext | None = None  # of the attempt before
    why: str = ""  # that one ended
    blocks: int = 0


class RunTraces(Observer):
    """`clock`: nanoseconds since the epoch. Attributes have no text and no tokens."""

    def __init__(self, tracer: Tracer, model: str, clock: Callable[[], int] = time.time_ns) -> None:
        self._tracer, self._model, self._clock = tracer, model, clock
        self._open: dict[RequestId, _Traced] = {}

    def opened(self, record: Record) -> None:
        now, parent = self._clock(), record.parent
        context = _W3C.extract({"traceparent": parent.traceparent, "tracestate": parent.tracestate})
        attributes: Attributes = {"gen_ai.request.model": self._model, "gen_ai.response.id": record.request.id}
        attributes |= {"twotower.mode": mode_of(record), "twotower.label": record.label}
        request = self._tracer.start_span("request", context, SpanKind.SERVER, attributes, start_time=now)
        self._open[record.request.id] = _Traced(request, self._child(request, "queue", now), now)

    def placed(self, record: Record) -> None:
        run, now = self._open[record.request.id], self._clock()
        _end(run.queue, now)
        if run.attempt is not None:  # the cell it leaves has not failed
            self._leave(run, now, "another cell goes on")
        links = [Link(run.before, {"twotower.why": run.why})] if run.before is not None else []
        attributes: Attributes = {
            "twotower.cell": record.attempts[-1],
            "twotower.committed_tokens": len(record.committed),
        }
        context = set_span_in_context(run.request)
        run.attempt = self._tracer.start_span("attempt", context, links=links, attributes=attributes, start_time=now)
        run.queue, run.last = None, now

    def event(self, record: Record, event: AnswerEvent) -> None:
        run, now = self._open[record.request.id], self._clock()
        if isinstance(event, BlockEvent) and mode_of(record) in _SPANNED and run.attempt is not None:
            run.blocks += 1
            if run.blocks <= MOST_BLOCKS:
                self._child(run.attempt, "block", run.last, _cost(event)).end(now)
        run.last = now

    def resumed(self, record: Record, error: TwoTowerError) -> None:
        run, now = self._open[record.request.id], self._clock()
        if run.attempt is not None:
            run.attempt.set_status(Status(StatusCode.ERROR, type(error).__name__))
            self._leave(run, now, type(error).__name__)
        if run.queue is None:
            run.queue = self._child(run.request, "queue", now)

    def ended(self, record: Record, error: BaseException | None) -> None:
        run, now = self._open.pop(record.request.id), self._clock()
        for span in (run.queue, run.attempt):
            _end(span, now)
        run.request.set_attributes(_told(record))
        code = grpc.StatusCode.OK if error is None else code_of_end(error)
        if code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
            run.request.set_status(Status(StatusCode.ERROR, code.name))
        run.request.set_attribute("rpc.grpc.status_code", code.value[0])
        run.request.end(now)

    def _leave(self, run: _Traced, now: int, why: str) -> None:
        assert run.attempt is not None
        run.attempt.end(now)
        run.before, run.why, run.attempt = run.attempt.get_span_context(), why, None

    def _child(self, parent: Span, name: str, start: int, attributes: Attributes | None = None) -> Span:
        return self._tracer.start_span(name, set_span_in_context(parent), attributes=attributes, start_time=start)


def _end(span: Span | None, now: int) -> None:
    if span is not None:
        span.end(now)


def _cost(event: BlockEvent) -> Attributes:
    cost: Attributes = {"twotower.start": event.start, "twotower.steps": event.num_steps}
    return cost | {"twotower.tokens": len(event.token_ids)} | _drafts(event)


def _drafts(told: BlockEvent | Usage) -> Attributes:
    """The counts of drafts in `verified`, if there were any."""
    if not told.num_drafted:
        return {}
    return {"twotower.drafted": told.num_drafted, "twotower.accepted": told.num_accepted}


def _told(record: Record) -> Attributes:
    """A request's cost, under OpenTelemetry's names where they exist."""
    request, usage = record.request, record.usage
    told: Attributes = {"twotower.steps": usage.num_steps, "twotower.blocks": usage.num_blocks}
    told |= _drafts(usage)
    told["gen_ai.usage.input_tokens"] = len(
        request.token_ids if isinstance(request, ScoreRequest) else request.prompt_token_ids
    )
    told["gen_ai.usage.output_tokens"] = usage.completion_tokens
    told["twotower.attempts"] = len(record.attempts)
    if isinstance(request, Request):
        told["gen_ai.request.max_tokens"] = request.params.max_new_tokens
    if record.finish_reason is not None:
        told["gen_ai.response.finish_reasons"] = [str(record.finish_reason)]
    return told
