"""A router's observers: which of them a way of watching has, and what each costs by itself, without a service."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from opentelemetry.sdk.trace import TracerProvider

from benchmarks.watching_parts.figures import Way
from cluster.board.runs_seen import RunsSeen
from cluster.runs.answer import Usage
from cluster.runs.observers import Observer
from cluster.runs.record import Record
from cluster.watch import request_log
from cluster.watch.request_log import RequestLog
from cluster.watch.run_metrics import RunMetrics
from cluster.watch.run_traces import RunTraces
from cluster.watch.tally import Tally
from twotower.core import BlockEvent, DecodingParams, FinishReason, Mode, Request, RequestId

_BLOCK, _AT_ONCE = 16, 16
OBSERVERS: dict[str, Callable[[], Observer]] = {
    "log line": RequestLog,
    "metrics": lambda: RunMetrics(Tally()),
    "ops page": lambda: RunsSeen(lambda kind, text: None),
    "traces": lambda: RunTraces(TracerProvider().get_tracer("twotower"), "demo"),
}


def chosen(every: tuple[Observer, ...], way: Way) -> tuple[Observer, ...]:
    """Of a router's observers those that this way has. Raises RuntimeError where it has no traces to leave out."""
    if not any(isinstance(one, RunTraces) for one in every):
        raise RuntimeError("the router makes no traces: is the exporter installed, and the collector named?")
    if way is Way.OFF:
        return ()
    return tuple(one for one in every if way is Way.TRACES or not isinstance(one, RunTraces))


def costs_us(name: str, mode: Mode, tokens: int, requests: int) -> float:
    """Microseconds of a request of so many tokens, beyond those that an observer costs which does nothing. What is told
    to Ray once a second, and the sending of spans, is not in it."""
    with _log_lines_to_nowhere():
        times = [_seconds(make(), mode, tokens, requests) for make in (OBSERVERS[name], Observer)]
    return 1e6 * (times[0] - times[1]) / requests


def _seconds(observer: Observer, mode: Mode, tokens: int, requests: int) -> float:
    """CPU time of the thread. So many at a time, as a router has them."""
    params = DecodingParams(mode=mode, max_new_tokens=tokens)
    events = _events(mode, tokens)
    spent = 0.0
    for first in range(0, requests, _AT_ONCE):
        ids = [RequestId(f"req-{first + place}") for place in range(_AT_ONCE)]
        records = [Record(Request(each, (5,) * 20, params), "f00d", usage=Usage(20)) for each in ids]
        began = time.thread_time()
        _play(observer, records, events)
        spent += time.thread_time() - began
    return spent


def _play(observer: Observer, records: Sequence[Record], events: Sequence[BlockEvent]) -> None:
    for record in records:
        observer.opened(record)
        record.attempts.append("cell")
        observer.placed(record)
    for place, event in enumerate(events):
        for record in records:
            if not place:
                observer.first_event(record, event)
            observer.event(record, event)
            record.usage = record.usage.plus(event)
    for record in records:
        record.finish_reason = FinishReason.LENGTH
        observer.ended(record, None)


def _events(mode: Mode, tokens: int) -> list[BlockEvent]:
    width = _BLOCK if mode is Mode.DIFFUSION else 1
    steps = 3 if mode is Mode.DIFFUSION else 0
    last = tokens - width
    return [
        BlockEvent(RequestId("any"), start, (5,) * width, steps, 1, FinishReason.LENGTH if start == last else None)
        for start in range(0, tokens, width)
    ]


@contextmanager
def _log_lines_to_nowhere() -> Iterator[None]:
    """They are made and written, as in a router."""
    logger = logging.getLogger(request_log.__name__)
    before = logger.level, logger.propagate
    with open(os.devnull, "w") as nowhere:
        handler = logging.StreamHandler(nowhere)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.level, logger.propagate = before
