"""The messages of a link's control connection."""

from dataclasses import dataclass
from typing import get_args

from twotower.exchange.protocol import Commit, Delta, Failed, Prefill, Release, Released
from twotower.transport.codec import Codec


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
    """A payload has been written into the mirror, so a staging buffer is free again."""


Message = Heartbeat | Payload | Taken | Prefill | Commit | Release | Failed | Released
CODEC: Codec[Message] = Codec(*get_args(Message))
