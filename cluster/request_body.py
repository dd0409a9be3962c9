"""The body of an HTTP request, whole and decompressed: bounded in bytes, in time, and over all that arrive at once."""

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request

from cluster.error_codes import SlowBody, UnknownEncoding
from twotower.errors import Cancelled, InvalidRequest, Overloaded
from twotower.validation import show

MAX_BODIES = 1024  # that arrive at a time
_BODIES_HELD = 64  # of the largest size that all of them may fill together
_PIECE = 128 * 1024  # bytes decompressed in one go
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's way of telling the format
ENCODINGS = ("gzip", "deflate", "identity")


class BodyReader:
    """Reads the bodies of one router's requests, each within `timeout_s` and `max_bytes`, before and after decoding."""

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._bodies, self._bytes = 0, 0

    async def read(self, request: Request) -> bytes:
        """Raises InvalidRequest (SlowBody, UnknownEncoding), Overloaded where too much arrives already, Cancelled."""
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity" and encoding not in _WINDOW_BITS:
            wanted = ", ".join(ENCODINGS)
            raise UnknownEncoding.of("content-encoding", f"got {show(encoding)}, wanted one of {wanted}")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > self._max_bytes:
            raise self._too_big()
        with self._arriving():
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._read(request, encoding)
            except TimeoutError:
                raise SlowBody.of("body", f"not whole within {self._timeout_s:g} s of the headers") from None
            except ClientDisconnect:
                raise Cancelled("the client has disconnected before its request was whole") from None

    @contextmanager
    def _arriving(self) -> Iterator[None]:
        if self._bodies >= MAX_BODIES:
            raise Overloaded(f"{self._bodies} bodies of requests are arriving, wanted fewer than {MAX_BODIES}")
        self._bodies += 1
        try:
            yield
        finally:
            self._bodies -= 1

    async def _read(self, request: Request, encoding: str) -> bytes:
        body, received = bytearray(), 0
        parts = self._counted(request)
        decoded = parts if encoding == "identity" else _inflated(parts, encoding)
        try:
            async for part in decoded:
                body += part
                received += len(part)
                self._bytes += len(part)
                if received > self._max_bytes:
                    raise self._too_big()
                if self._bytes > _BODIES_HELD * self._max_bytes:
                    raise Overloaded(f"{self._bytes} bytes of requests are arriving, wanted fewer at a time")
        finally:
            self._bytes -= received
        return bytes(body)

    async def _counted(self, request: Request) -> AsyncIterator[bytes]:
        received = 0
        async for part in request.stream():
            received += len(part)
            if received > self._max_bytes:
                raise self._too_big()
            yield part

    def _too_big(self) -> InvalidRequest:
        return InvalidRequest.of("body", f"got more than {self._max_bytes} bytes, wanted at most that many")


async def _inflated(parts: AsyncIterator[bytes], encoding: str) -> AsyncGenerator[bytes, None]:
    """In small pieces, so that a few bytes which stand for very many are found out early and hold up nobody."""
    inflating = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        async for part in parts:
            while part and not inflating.eof:
                yield inflating.decompress(part, _PIECE)
                part = inflating.unconsumed_tail
                await asyncio.sleep(0)
            if part or inflating.unused_data:
                raise InvalidRequest.of("body", f"goes on after the end of its {encoding} data")
    except zlib.error as error:
        raise InvalidRequest.of("body", f"not {encoding}, which content-encoding says: {error}") from None
    if not inflating.eof:
        raise InvalidRequest.of("body", f"ends before its {encoding} data does")
