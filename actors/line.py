"""The line between a cell and a tower process: requests go in, events come out, over one loopback connection.

Ray starts, places and ends the processes, but events do not go through it. A Ray call costs the tower's interpreter
milliseconds, as much as a small model's forward. A message costs some tens of microseconds.
"""

from dataclasses import dataclass

from twotower.core import (
    AnyRequest,
    BlockEvent,
    Event,
    FailureEvent,
    ReleasedEvent,
    Request,
    RequestId,
    RoundEvent,
    ScoreEvent,
    ScoreRequest,
    StepEvent,
)
from twotower.transport.codec import Codec

SILENCE_S = 3.0  # after this silence at most, whatever the link's timeout, the other end is taken for dead


@dataclass(frozen=True, slots=True)
class Add:
    """Decode this request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Score:
    """Score this request."""

    request: ScoreRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel this request."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine has ended; nothing follows."""

    reason: str


Instruction = Add | Score | Cancel
News = Event | Ended
LINE: Codec[Instruction | News] = Codec(
    Add, Score, Cancel, BlockEvent, ScoreEvent, StepEvent, RoundEvent, FailureEvent, ReleasedEvent, Ended
)


def instruction_of(request: AnyRequest) -> Instruction:
    """The instruction that starts the request in a tower process."""
    return Score(request) if isinstance(request, ScoreRequest) else Add(request)
