"""Frames over a TCP connection between our own processes: a length, then bytes. Whoever connects shows a token first.

What a frame holds is `twotower.wire`'s business.
"""

import asyncio
import contextlib
import hmac
import secrets
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

_LENGTH = struct.Struct("!I")
_MAX_BYTES = 64 << 20
TOKEN_BYTES = 32
GREETING_S = 5.0

Message = TypeVar("Message")


@dataclass(frozen=True, slots=True)
class LineAddress:
    """Where a process listens. Carries a secret: hand it over privately, never log it whole."""

    host: str
    port: int
    token: bytes = field(repr=False)


def new_token() -> bytes:
    return secrets.token_bytes(TOKEN_BYTES)


def is_token(shown: bytes, wanted: bytes) -> bool:
    return hmac.compare_digest(shown, wanted)


def framed(body: bytes) -> bytes:
    """One frame. Raises ValueError for more than 64 MiB."""
    if len(body) > _MAX_BYTES:
        raise ValueError(f"got a frame of {len(body)} bytes, wanted at most {_MAX_BYTES}")
    return _LENGTH.pack(len(body)) + body


def framed_all(
    messages: Sequence[Message], encode: Callable[[Sequence[Message]], bytes]
) -> tuple[bytes, list[Message]]:
    """Frames of all the messages, in their order and as few as hold them, and the messages that fit in none."""
    body = encode(messages)
    if len(body) <= _MAX_BYTES:
        return framed(body), []
    if len(messages) == 1:
        return b"", list(messages)
    half = len(messages) // 2
    (first, large), (second, larger) = (framed_all(part, encode) for part in (messages[:half], messages[half:]))
    return first + second, large + larger


def take_frames(received: bytearray) -> Iterator[bytes]:
    """The bodies of all whole frames, taken off the front of what was received. Raises ConnectionError for no frame."""
    while len(received) >= _LENGTH.size:
        end = _LENGTH.size + _checked_length(received)
        if len(received) < end:
            return
        body = bytes(received[_LENGTH.size : end])
        del received[:end]
        yield body


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next frame's body. Raises ConnectionError, or EOFError (IncompleteReadError) at the end."""
    return await reader.readexactly(_checked_length(await reader.readexactly(_LENGTH.size)))


async def connect(address: LineAddress, timeout_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which the token has been shown. Raises OSError (TimeoutError among them)."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(address.host, address.port)
    at_once(writer.get_extra_info("socket"))
    writer.write(address.token)
    return reader, writer


def at_once(sock: socket.socket) -> None:
    """Small frames leave without waiting for the acknowledgement of the one before."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _checked_length(head: bytes | bytearray) -> int:
    (length,) = _LENGTH.unpack_from(head)
    if length > _MAX_BYTES:
        raise ConnectionError(f"got a frame of {length} bytes, wanted at most {_MAX_BYTES}")
    return int(length)
