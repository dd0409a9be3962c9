"""The common begin of calls that need a cell: deadline, caller, body, names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from fastapi import Request

from cluster.faces.error_codes import NoSuchModel
from cluster.faces.http.gate import caller_of
from cluster.faces.http.request_body import BodyReader
from cluster.runs.callers import Caller
from cluster.runs.deadline import Deadline
from cluster.runs.generation import Generation
from cluster.runs.labels import REQUEST_ID, label_of
from cluster.runs.trace_parent import TraceParent
from twotower.errors import InvalidRequest
from twotower.showing import show
from twotower.strict_json import PARSED_S, parse_json

TIMEOUT_HEADER = "x-request-timeout"
CALL = "twotower.call"  # where the log finds the call's name in a scope


@dataclass(frozen=True, slots=True)
class Begun:
    """A call whose body has been read as a JSON object. `outer_id`: the client's label in the header, or empty."""

    deadline: Deadline
    caller: Caller
    parent: TraceParent
    outer_id: str
    body: dict[str, object]

    def headers(self, shown_id: str) -> dict[str, str]:
        """The answer's headers. Serve's proxy sets the id header itself if the request had one or the
        proxy drew one.
        """
        return {} if self.outer_id else {REQUEST_ID: shown_id}


async def begun(request: Request, generation: Generation, bodies: BodyReader) -> Begun:
    """Raises InvalidRequest, Unavailable once no more calls are taken, Overloaded, DeadlineExceeded, Cancelled."""
    deadline = generation.deadline(_timeout_of(request.headers))
    generation.check_open()
    async with deadline.over(), bodies.read(request) as raw:
        body = await generation.lanes.run(len(raw) * PARSED_S, partial(parse_json, raw), deadline)
    outer_id = label_of(request.headers.get(REQUEST_ID, ""))
    return Begun(deadline, caller_of(request), TraceParent.of(request.headers), outer_id, body)


def check_model(got: str | None, served: str) -> None:
    """Raises NoSuchModel for another model than the one served."""
    if got not in (None, served):
        raise NoSuchModel.of("model", f"got {show(got)}, wanted {show(served)}, the one served here")


def _timeout_of(headers: Mapping[str, str]) -> float | None:
    """Seconds that the client will wait; None if it does not say."""
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidRequest.of(TIMEOUT_HEADER, f"got {show(text)}, wanted a positive number of seconds")
    return seconds
