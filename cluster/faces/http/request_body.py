"""The body of an HTTP request, complete and decompressed: bounded in bytes, in time, and over all that
arrive at once.
"""

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from cluster.faces.error_codes import SlowBody, UnknownEncoding
from cluster.faces.http.gate import caller_of
from cluster.runs.shares import Shares
from twotower.errors import Cancelled, InvalidRequest
from twotower.showing import show

MAX_BODIES = 1024  # bodies that arrive or wait to be parsed at a time
_BODIES_HELD = 64  # all of them together may fill so many times the largest size
_PIECE = 128 * 1024  # bytes decompressed at a time
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's code for the format
ENCODINGS = ("gzip", "deflate", "identity")


class BodyReader:
    """Reads the bodies of one router's requests, each within `timeout_s` and `max_bytes`, before and after decoding."""

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._bodies = Shares(MAX_BODIES, "bodies of requests that are arriving")
        self._bytes = Shares(_BODIES_HELD * max_bytes, "bytes of requests that are arriving")

    @property
    def held(self) -> int:
        """Bytes of bodies that arrive or wait to be parsed."""
        return self._bytes.total

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncGenerator[bytearray, None]:
        """The body, held while it is parsed: until the block ends it counts as arriving.

        Raises InvalidRequest (SlowBody, UnknownEncoding), Overloaded if too much arrives already, Cancelled.
        """
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity" and encoding not in _WINDOW_BITS:
            wanted = ", ".join(ENCODINGS)
            raise UnknownEncoding.of("content-encoding", f"got {show(encoding)}, wanted one of {wanted}")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > self._max_bytes:
            raise self._too_big()
        body, caller = bytearray(), caller_of(request).name
        self._bodies.take(caller)
        try:
            await self._arrival(body, request, encoding)
            yield body
        finally:
            self._bodies.give_back(caller)
            self._bytes.give_back(caller, len(body))

    async def _arrival(self, body: bytearray, request: Request, encoding: str) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._fill(body, request, encoding)
        except TimeoutError:
            raise SlowBody.of("body", f"not complete within {self._timeout_s:g} s of the headers") from None
        except ClientDisconnect:
            raise Cancelled("the client has disconnected before its request was complete") from None

    async def _fill(self, body: bytearray, request: Request, encoding: str) -> None:
        parts = self._bounded(request)
        async for part in parts if encoding == "identity" else _inflated(parts, encoding):
            if len(body) + len(part) > self._max_bytes:
                raise self._too_big()
            self._bytes.take(caller_of(request).name, len(part))
            body += part

    async def _bounded(self, request: Request) -> AsyncIterator[bytes]:
        received = 0
        async for part in request.stream():
            received += len(part)
            if received > self._max_bytes:
                raise self._too_big()
            yield part

    def _too_big(self) -> InvalidRequest:
        return InvalidRequest.of("body", f"got more than {self._max_bytes} bytes, wanted at most that many")


async def _inflated(parts: AsyncIterator[bytes], encoding: str) -> AsyncGenerator[bytes, None]:
    """Decompressed in small pieces, so that a decompression bomb is found early and blocks nothing."""
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
