"""A log line for each request at its end: one JSON object with its numbers and none of its text. Also a line for each
move.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.runs.observers import Observer
from cluster.runs.record import Record
from cluster.watch.words import code_of_end, mode_of
from twotower.core import AnswerEvent, Request, RequestId
from twotower.errors import InvalidRequest, TwoTowerError, Unavailable
from twotower.showing import one_line

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Times:
    """One run's times on the clock; `margin`: the smallest of its decisions, if its last event has it."""

    opened: float
    placed: float | None = None
    first: float | None = None
    resumes: int = 0
    margin: float | None = None


class RequestLog(Observer):
    """`request {…}` for each end, at warning level if no cell could finish it. Token ids and text stay out: of prompt
    and answer it has only lengths.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[RequestId, _Times] = {}

    def opened(self, record: Record) -> None:
        self._open[record.request.id] = _Times(self._clock())

    def placed(self, record: Record) -> None:
        times = self._open[record.request.id]
        times.placed = times.placed or self._clock()

    def first_event(self, record: Record, event: AnswerEvent) -> None:
        self._open[record.request.id].first = self._clock()

    def event(self, record: Record, event: AnswerEvent) -> None:
        if event.is_last:
            self._open[record.request.id].margin = event.margin

    def resumed(self, record: Record, error: TwoTowerError) -> None:
        self._open[record.request.id].resumes += 1
        cell = record.attempts[-1]
        logger.warning("run %s goes on after %d tokens: cell %s: %s", record.name, len(record.committed), cell, error)

    def ended(self, record: Record, error: BaseException | None) -> None:
        times, now = self._open.pop(record.request.id), self._clock()
        level = logging.WARNING if isinstance(error, Unavailable) else logging.INFO
        if logger.isEnabledFor(level):
            told = _asked(record) | _got(record, error) | _took(times, now) | {"margin": times.margin}
            known = {name: value for name, value in told.items() if value is not None}
            logger.log(level, "request %s", json.dumps(known))


def _asked(record: Record) -> dict[str, object]:
    request = record.request
    asked: dict[str, object] = {"id": request.id, "label": record.label or None, "key": record.caller.key}
    asked |= {"mode": mode_of(record)}
    if not isinstance(request, Request):
        return asked | {"prompt_tokens": request.start, "scored_tokens": len(request.token_ids) - request.start}
    params = request.params
    asked |= {"prompt_tokens": len(request.prompt_token_ids), "max_new_tokens": params.max_new_tokens}
    return asked | {"temperature": params.temperature, "priority": request.priority or None}


def _got(record: Record, error: BaseException | None) -> dict[str, object]:
    usage, cells = record.usage, record.attempts
    outcome = code_of_end(error).name if error is not None else str(record.finish_reason or "stop")
    got: dict[str, object] = {"outcome": outcome, "why": _why(error)}
    got |= {"cell": cells[-1] if cells else None, "cells": len(cells)}
    got |= {"tokens": usage.completion_tokens, "blocks": usage.num_blocks, "steps": usage.num_steps}
    got |= {"drafted": usage.num_drafted or None, "accepted": usage.num_accepted if usage.num_drafted else None}
    got |= {"cached_tokens": usage.cached_tokens or None}
    return got | {"ar_blocks": usage.num_ar_blocks or None, "diffusion_blocks": usage.num_diffusion_blocks or None}


def _why(error: BaseException | None) -> str | None:
    """The error's message; None for a wrong request's, which shows the client's values, and for a foreign error."""
    if not isinstance(error, TwoTowerError) or isinstance(error, InvalidRequest):
        return None if error is None else type(error).__name__
    return one_line(str(error))


def _took(times: _Times, now: float) -> dict[str, object]:
    """Seconds since it was opened."""
    moments = {"queue_s": times.placed, "first_token_s": times.first, "seconds": now}
    told = {name: None if moment is None else round(moment - times.opened, 4) for name, moment in moments.items()}
    return {**told, "resumes": times.resumes}
