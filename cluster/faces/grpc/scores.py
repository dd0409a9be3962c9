"""Reads a ScoreRequest and writes its answer: one continuation of a prompt, or several."""

import math
from collections.abc import Sequence
from typing import Any

from cluster.runs.continuations import FIRST, Continuations
from cluster.runs.run import Scoring
from twotower.core import ScoreEvent
from twotower.errors import FieldError, InvalidRequest
from twotower.pb.twotower.v1 import generation_pb2 as pb

Part = str | Sequence[object]
_KINDS = ("more_continuation_texts", "more_continuation_token_ids")


def continuations_of(request: pb.ScoreRequest, label: str, own_id: str) -> Continuations:
    """Raises InvalidRequest if a part is missing."""
    parts = {name: _part(request, name) for name in ("prompt", FIRST)}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise InvalidRequest([FieldError(n, f"missing, wanted {n}_text or {n}_token_ids") for n in missing])
    prompt, first = (part for part in parts.values() if part is not None)
    named = [(FIRST, first), *_further(request)]
    return Continuations(prompt, named, label, request.priority, own_id, ids=".ids")


def score_message(runs: Sequence[Scoring], events: Sequence[ScoreEvent]) -> pb.ScoreResponse:
    first, *others = map(_scored, runs, events)
    return pb.ScoreResponse(
        request_id=runs[0].shown_id,
        prompt_tokens=runs[0].request.start,
        cached_tokens=events[0].cached_tokens,
        others=[pb.ScoredContinuation(**other) for other in others],
        **first,
    )


def _scored(run: Scoring, event: ScoreEvent) -> dict[str, Any]:
    return {
        "token_ids": run.request.token_ids[run.request.start :],
        "log_probs": event.log_probs,
        "is_greedy": event.is_greedy,
        "sum_log_prob": math.fsum(event.log_probs),
    }


def _further(request: pb.ScoreRequest) -> list[tuple[str, Part]]:
    texts, ids = request.more_continuation_texts, request.more_continuation_token_ids
    if texts and ids:
        raise InvalidRequest.of(_KINDS[1], f"got it beside {_KINDS[0]}, wanted one of them")
    name, parts = (_KINDS[0], list(texts)) if texts else (_KINDS[1], [one.ids for one in ids])
    return [(f"{name}[{place}]", part) for place, part in enumerate(parts)]


def _part(request: pb.ScoreRequest, name: str) -> Part | None:
    field = request.WhichOneof(name)
    if field is None:
        return None
    given = getattr(request, field)
    return given.ids if isinstance(given, pb.TokenIds) else str(given)
