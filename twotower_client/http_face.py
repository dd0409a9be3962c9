"""The HTTP face over httpx2, blocking and with asyncio. `http_codec` reads and writes the bodies."""

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from typing import Any

import httpcore2
import httpx2

from twotower_client import deadlines
from twotower_client.answers import Answer, Event, ModelInfo, Readiness, Score
from twotower_client.asking import Ask, Chat, ScoreAsk
from twotower_client.errors import DeadlineExceeded, Details, ServiceError, Unavailable
from twotower_client.http_codec import (
    HttpCall,
    StreamReader,
    Told,
    answer_in,
    completion_call,
    detokenize_call,
    health_call,
    model_call,
    ready_call,
    score_call,
    stream_call,
    tokenize_call,
)
from twotower_client.http_errors import error_from
from twotower_client.proxies import proxy_to
from twotower_client.target import Target
from twotower_client.tls_mistakes import explained

_CONNECT_S = 10.0
_KEPT = 128  # idle connections
_READY = (200, 503)


def _settings(target: Target) -> dict[str, Any]:
    return {
        "base_url": target.url,
        "headers": target.credentials,
        "trust_env": False,  # `proxies` chooses the proxy
        "verify": target.tls.context() if target.secure else False,
        "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=_KEPT),
    }


def _sent(call: HttpCall[Any], timeout_s: float | None, server_name: str | None) -> dict[str, Any]:
    """The arguments of httpx2's request. The service gets the deadline, too."""
    connect = _CONNECT_S if timeout_s is None else min(_CONNECT_S, timeout_s)
    headers = {} if timeout_s is None or call.body is None else {"x-request-timeout": f"{timeout_s:.3f}"}
    if call.body is not None:
        headers["content-type"] = "application/json"
    return {
        "method": call.method,
        "url": call.path,
        "content": call.body,
        "headers": headers,
        "timeout": httpx2.Timeout(timeout_s, connect=connect),
        "extensions": {} if server_name is None else {"sni_hostname": server_name},
    }


# Errors of our own transport, and of httpx2's with asyncio or in tests.
_NO_CONNECTION = (httpx2.ConnectTimeout, httpx2.ConnectError, httpcore2.ConnectTimeout, httpcore2.ConnectError)
_BROKEN = (httpx2.TransportError, httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.ProxyError)


@contextmanager
def _told_of(request_id: str) -> Iterator[None]:
    """Turns httpx2's errors into errors of this package."""
    try:
        yield
    except _NO_CONNECTION as error:
        message = f"no connection: {str(error) or type(error).__name__}"
        raise Unavailable(message, Details("UNAVAILABLE", request_id=request_id)) from None
    except (httpx2.TimeoutException, httpcore2.TimeoutException, TimeoutError):
        message = "the deadline passed without an answer"
        raise DeadlineExceeded(message, Details("DEADLINE_EXCEEDED", request_id=request_id)) from None
    except _BROKEN as error:
        message = f"the connection broke: {str(error) or type(error).__name__}"
        raise Unavailable(message, Details("UNAVAILABLE", request_id=request_id)) from None


def _cut_short(request_id: str) -> Unavailable:
    return Unavailable("the stream ended before its end", Details("UNAVAILABLE", request_id=request_id))


def _transport(target: Target) -> httpx2.BaseTransport:
    context = target.tls.context() if target.secure else None
    return deadlines.Transport(context, _KEPT, deadlines.Backend(), proxy_to(target))


def _ends_at(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else deadlines.clock() + timeout_s


def _left_s(ends_at: float | None) -> float | None:
    return None if ends_at is None else ends_at - deadlines.clock()


def _loop_ends_at(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s


class HttpFace:
    """Blocking calls over HTTP, safe from several threads. `transport`: httpx2's, for tests."""

    def __init__(self, target: Target, transport: httpx2.BaseTransport | None = None) -> None:
        self._target, self._name = target, target.tls.server_name
        self._http = httpx2.Client(**_settings(target), transport=transport or _transport(target))

    def complete(self, ask: Ask, timeout_s: float | None) -> Answer:
        return self._call(completion_call(ask), timeout_s)

    def score(self, ask: ScoreAsk, timeout_s: float | None) -> tuple[Score, ...]:
        return self._call(score_call(ask), timeout_s)

    def tokenize(self, given: str | Chat, add_special_tokens: bool | None, timeout_s: float | None) -> tuple[int, ...]:
        return self._call(tokenize_call(given, add_special_tokens), timeout_s)

    def detokenize(self, token_ids: Sequence[int], timeout_s: float | None) -> str:
        return self._call(detokenize_call(token_ids), timeout_s)

    def model_info(self, timeout_s: float | None) -> ModelInfo:
        return self._call(model_call(), timeout_s)

    def readiness(self, timeout_s: float | None) -> Readiness:
        return self._call(ready_call(), timeout_s, _READY)

    def is_alive(self, timeout_s: float | None) -> bool:
        return self._call(health_call(), timeout_s)

    def stream(self, ask: Ask, timeout_s: float | None) -> Generator[Event, None, None]:
        call, reader, ends_at = stream_call(ask), StreamReader(ask), _ends_at(timeout_s)
        with _told_of(ask.request_id), ExitStack() as opened:
            response = self._opened(opened, call, timeout_s, ends_at)
            parts = response.iter_bytes()
            while not reader.ended:
                with deadlines.until(ends_at):  # does not run while the caller works
                    data = next(parts, None)
                if data is None:
                    raise _cut_short(ask.request_id)
                yield from reader.push(data)

    def close(self) -> None:
        self._http.close()

    def _opened(
        self, opened: ExitStack, call: HttpCall[None], timeout_s: float | None, ends_at: float | None
    ) -> httpx2.Response:
        try:
            with _told_of(call.request_id), deadlines.until(ends_at):
                response = opened.enter_context(self._http.stream(**_sent(call, timeout_s, self._name)))
                if response.status_code != 200:
                    raise error_from(response.status_code, response.headers, response.read(), call.request_id)
                return response
        except Unavailable as error:
            raise explained(self._target, error, _left_s(ends_at)) from None

    def _call(self, call: HttpCall[Told], timeout_s: float | None, good: tuple[int, ...] = (200,)) -> Told:
        ends_at = _ends_at(timeout_s)
        try:
            with _told_of(call.request_id), deadlines.until(ends_at):
                response = self._http.request(**_sent(call, timeout_s, self._name))
        except Unavailable as error:
            raise explained(self._target, error, _left_s(ends_at)) from None
        if response.status_code not in good:
            raise error_from(response.status_code, response.headers, response.content, call.request_id)
        return answer_in(call, response.content)


class AsyncHttpFace:
    """Calls over HTTP with asyncio. `transport`: httpx2's, for tests."""

    def __init__(self, target: Target, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self._target, self._name = target, target.tls.server_name
        proxy = proxy_to(target) if transport is None else None
        self._http = httpx2.AsyncClient(**_settings(target), transport=transport, proxy=proxy)

    async def complete(self, ask: Ask, timeout_s: float | None) -> Answer:
        return await self._call(completion_call(ask), timeout_s)

    async def score(self, ask: ScoreAsk, timeout_s: float | None) -> tuple[Score, ...]:
        return await self._call(score_call(ask), timeout_s)

    async def tokenize(
        self, given: str | Chat, add_special_tokens: bool | None, timeout_s: float | None
    ) -> tuple[int, ...]:
        return await self._call(tokenize_call(given, add_special_tokens), timeout_s)

    async def detokenize(self, token_ids: Sequence[int], timeout_s: float | None) -> str:
        return await self._call(detokenize_call(token_ids), timeout_s)

    async def model_info(self, timeout_s: float | None) -> ModelInfo:
        return await self._call(model_call(), timeout_s)

    async def readiness(self, timeout_s: float | None) -> Readiness:
        return await self._call(ready_call(), timeout_s, _READY)

    async def is_alive(self, timeout_s: float | None) -> bool:
        return await self._call(health_call(), timeout_s)

    async def stream(self, ask: Ask, timeout_s: float | None) -> AsyncGenerator[Event, None]:
        call, reader = stream_call(ask), StreamReader(ask)
        ends_at = _loop_ends_at(timeout_s)
        with _told_of(ask.request_id):
            async with AsyncExitStack() as opened:
                response = await self._opened(opened, call, timeout_s, ends_at)
                parts = response.aiter_bytes()
                while not reader.ended:
                    async with asyncio.timeout_at(ends_at):  # does not run while the caller works
                        data = await anext(parts, None)
                    if data is None:
                        raise _cut_short(ask.request_id)
                    for event in reader.push(data):
                        yield event

    async def close(self) -> None:
        await self._http.aclose()

    async def _opened(
        self, opened: AsyncExitStack, call: HttpCall[None], timeout_s: float | None, ends_at: float | None
    ) -> httpx2.Response:
        try:
            with _told_of(call.request_id):
                async with asyncio.timeout_at(ends_at):
                    response = await opened.enter_async_context(self._http.stream(**_sent(call, timeout_s, self._name)))
                    if response.status_code != 200:
                        body = await response.aread()
                        raise error_from(response.status_code, response.headers, body, call.request_id)
                    return response
        except Unavailable as error:
            raise await self._why(error, ends_at) from None

    async def _why(self, error: Unavailable, ends_at: float | None) -> ServiceError:
        left_s = None if ends_at is None else ends_at - asyncio.get_running_loop().time()
        return await asyncio.to_thread(explained, self._target, error, left_s)

    async def _call(self, call: HttpCall[Told], timeout_s: float | None, good: tuple[int, ...] = (200,)) -> Told:
        ends_at = _loop_ends_at(timeout_s)
        try:
            with _told_of(call.request_id):
                async with asyncio.timeout_at(ends_at):
                    response = await self._http.request(**_sent(call, timeout_s, self._name))
        except Unavailable as error:
            raise await self._why(error, ends_at) from None
        if response.status_code not in good:
            raise error_from(response.status_code, response.headers, response.content, call.request_id)
        return answer_in(call, response.content)
