"""The control messages of a link and their bytes.

A frame is `[number, [[kind, fields], ...]]`; frames of a connection are numbered from 0, so that a lost, repeated
or reordered one is seen. Knows nothing of connections or tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from twotower.exchange.protocol import Attach, Commit, Delta, Failed, Prefill, Release, Released
from twotower.wire import Codec, CodecError, from_json, to_json


@dataclass(frozen=True, slots=True)
class Hello:
    """The denoiser side introduces itself. `layout` describes a delta's tensors, `device` where its mirror lives."""

    version: int
    link: int
    epoch: int
    layout: str
    device: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """The context side agrees; both now build a data group of this backend."""

    backend: str


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """`progress` grows while the sender's engine lives."""

    progress: int


@dataclass(frozen=True, slots=True)
class Payload:
    """`nbytes` follow in the data group: these deltas' tensors, one after the other."""

    number: int
    nbytes: int
    deltas: tuple[Delta, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """A payload has been written into the mirror: there is a free staging buffer again."""


Message = (
    Hello | Welcome | Refused | Heartbeat | Payload | Taken | Prefill | Commit | Attach | Release | Failed | Released
)

_CODEC: Codec[Message] = Codec(*get_args(Message))


def encode(number: int, messages: Sequence[Message]) -> bytes:
    """One frame."""
    return to_json([number, [_CODEC.plain(message) for message in messages]])


def decode(frame: bytes) -> tuple[int, list[Message]]:
    """A frame's number and messages. Raises CodecError."""
    match from_json(frame):
        case [int(number), [*body]] if number is not True and number is not False:
            return number, [_CODEC.message(item) for item in body]
    raise CodecError(f"got {frame[:80]!r}, wanted [number, [[kind, fields], ...]]")
