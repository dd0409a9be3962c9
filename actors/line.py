"""The line between a cell and a tower process: requests go in, events come out, over one loopback connection.

Ray starts, places and ends the processes, but events do not go through it: a call of Ray's costs the tower's
interpreter milliseconds, as much as a small model's forward; a message costs some tens of microseconds.
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

SILENCE_S = 3.0  # at most, whatever the link's patience: then the other end is taken for dead


@dataclass(frozen=True, slots=True)
class Add:
    """Decode this request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Score:
    """Score this one."""

    request: ScoreRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give this one up."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine is gone; nothing follows."""

    reason: str


Instruction = Add | Score | Cancel
News = Event | Ended
LINE: Codec[Instruction | News] = Codec(
    Add, Score, Cancel, BlockEvent, ScoreEvent, StepEvent, RoundEvent, FailureEvent, ReleasedEvent, Ended
)


def instruction_of(request: AnyRequest) -> Instruction:
    """What makes a tower process start on it."""
    return Score(request) if isinstance(request, ScoreRequest) else Add(request)
