"""A deadline that holds for a whole blocking HTTP call, however many waits it has. Sends nothing of its own.

An HTTP client bounds each wait separately: one for a connection, one for each read. Here each wait gets the rest of the
call's time.
"""

import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import httpcore2
import httpx2

_ENDS_AT: ContextVar[float | None] = ContextVar("ends_at", default=None)
_PIECE = 64 * 1024  # bytes that are written in one wait
clock: Callable[[], float] = time.monotonic


@contextmanager
def until(ends_at: float | None) -> Iterator[None]:
    """This thread's waits on a connection inside the block end then, by `clock`."""
    before = _ENDS_AT.set(ends_at)
    try:
        yield
    finally:
        _ENDS_AT.reset(before)


def left_s(timeout_s: float | None) -> float | None:
    """The rest of the call's time, at most this wait's own limit. Raises httpcore2.ReadTimeout once nothing is left."""
    ends_at = _ENDS_AT.get()
    if ends_at is None:
        return timeout_s
    left = ends_at - clock()
    if left <= 0:
        raise httpcore2.ReadTimeout("the deadline passed")
    return left if timeout_s is None else min(left, timeout_s)


class _Stream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, left_s(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for at in range(0, len(buffer), _PIECE):
            self._stream.write(buffer[at : at + _PIECE], left_s(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left_s(timeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class Backend(httpcore2.NetworkBackend):
    """Connections by `backend`, which keep the deadline of the call that uses them."""

    def __init__(self, backend: httpcore2.NetworkBackend | None = None) -> None:
        self._backend = backend or httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        return _Stream(self._backend.connect_tcp(host, port, left_s(timeout), local_address, socket_options))


class _Body(httpx2.SyncByteStream):
    def __init__(self, parts: Any) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[bytes]:
        yield from self._parts

    def close(self) -> None:
        self._parts.close()


class Transport(httpx2.BaseTransport):
    """httpx2's transport to a service, direct or through a proxy, over a pool of such connections. Raises httpcore2's
    errors.
    """

    def __init__(
        self,
        context: ssl.SSLContext | None,
        kept: int,
        backend: httpcore2.NetworkBackend,
        proxy: httpx2.Proxy | None = None,
    ) -> None:
        self._pool = _pool(proxy, context, kept, backend)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        asked = httpcore2.Request(
            method=request.method,
            url=httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        told = self._pool.handle_request(asked)
        return httpx2.Response(told.status, headers=told.headers, stream=_Body(told.stream), extensions=told.extensions)

    def close(self) -> None:
        self._pool.close()


def _pool(
    proxy: httpx2.Proxy | None, context: ssl.SSLContext | None, kept: int, backend: httpcore2.NetworkBackend
) -> httpcore2.ConnectionPool:
    settings: dict[str, Any] = {
        "ssl_context": context,
        "max_connections": None,
        "max_keepalive_connections": kept,
        "keepalive_expiry": 5.0,
        "network_backend": backend,
    }
    if proxy is None:
        return httpcore2.ConnectionPool(**settings)
    kind = httpcore2.SOCKSProxy if proxy.url.scheme.startswith("socks") else httpcore2.HTTPProxy
    return kind(proxy_url=str(proxy.url), proxy_auth=proxy.raw_auth, **settings)
