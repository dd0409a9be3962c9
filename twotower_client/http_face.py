"""The HTTP face over httpx2, blocking and with asyncio. Decides nothing: `http_codec` reads and writes."""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2

from twotower_client.answers import Answer, Event, ModelInfo, Readiness, Score
from twotower_client.asking import Ask, Chat, ScoreAsk
from twotower_client.errors import DeadlineExceeded, Details, Unavailable
from twotower_client.http_codec import (
    HttpCall,
    StreamReader,
    Told,
    answer_in,
    completion_call,
    detokenize_call,
    error_from,
    health_call,
    model_call,
    ready_call,
    score_call,
    stream_call,
    tokenize_call,
)
from twotower_client.target import Target

_CONNECT_S = 10.0
_GRACE_S = 2.0  # beyond the deadline, for the service to say that it has passed
_READY = (200, 503)


def _settings(target: Target) -> dict[str, Any]:
    return {
        "base_url": target.url,
        "headers": target.credentials,
        "trust_env": target.use_proxies,
        "verify": target.tls.context() if target.secure else False,
        "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=128),
    }


def _sent(call: HttpCall[Any], timeout_s: float | None, server_name: str | None) -> dict[str, Any]:
    """What a request is built of. The service keeps the deadline, and is given the time to say that it has passed."""
    within = None if timeout_s is None else timeout_s + _GRACE_S
    connect = _CONNECT_S if timeout_s is None else min(_CONNECT_S, timeout_s)
    headers = {} if timeout_s is None or call.body is None else {"x-request-timeout": f"{timeout_s:.3f}"}
    if call.body is not None:
        headers["content-type"] = "application/json"
    return {
        "method": call.method,
        "url": call.path,
        "content": call.body,
        "headers": headers,
        "timeout": httpx2.Timeout(within, connect=connect),
        "extensions": {} if server_name is None else {"sni_hostname": server_name},
    }


@contextmanager
def _told_of(request_id: str) -> Iterator[None]:
    """What went wrong on the way, in our words."""
    try:
        yield
    except (httpx2.ConnectTimeout, httpx2.ConnectError) as error:
        message = f"no connection: {str(error) or type(error).__name__}"
        raise Unavailable(message, Details("UNAVAILABLE", request_id=request_id)) from None
    except (httpx2.TimeoutException, TimeoutError):
        message = "the deadline passed without an answer"
        raise DeadlineExceeded(message, Details("DEADLINE_EXCEEDED", request_id=request_id)) from None
    except httpx2.TransportError as error:
        message = f"the connection broke: {str(error) or type(error).__name__}"
        raise Unavailable(message, Details("UNAVAILABLE", request_id=request_id)) from None


def _cut_short(request_id: str) -> Unavailable:
    return Unavailable("the stream ended before its end", Details("UNAVAILABLE", request_id=request_id))


def _too_late(request_id: str) -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed", Details("DEADLINE_EXCEEDED", request_id=request_id))


class HttpFace:
    """Blocking. Calls may come from several threads. `transport`: httpx2's, for tests."""

    def __init__(self, target: Target, transport: httpx2.BaseTransport | None = None) -> None:
        self._name = target.tls.server_name
        self._http = httpx2.Client(**_settings(target), transport=transport)

    def complete(self, ask: Ask, timeout_s: float | None) -> Answer:
        return self._call(completion_call(ask), timeout_s)

    def score(self, ask: ScoreAsk, timeout_s: float | None) -> Score:
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
        call, reader = stream_call(ask), StreamReader(ask)
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s + _GRACE_S
        with _told_of(ask.request_id), self._http.stream(**_sent(call, timeout_s, self._name)) as response:
            if response.status_code != 200:
                raise error_from(response.status_code, response.headers, response.read(), ask.request_id)
            for data in response.iter_bytes():
                yield from reader.push(data)
                if reader.ended:
                    return
                if ends_at is not None and time.monotonic() > ends_at:
                    raise _too_late(ask.request_id)
        raise _cut_short(ask.request_id)

    def close(self) -> None:
        self._http.close()

    def _call(self, call: HttpCall[Told], timeout_s: float | None, good: tuple[int, ...] = (200,)) -> Told:
        with _told_of(call.request_id):
            response = self._http.request(**_sent(call, timeout_s, self._name))
        if response.status_code not in good:
            raise error_from(response.status_code, response.headers, response.content, call.request_id)
        return answer_in(call, response.content)


class AsyncHttpFace:
    """With asyncio. `transport`: httpx2's, for tests."""

    def __init__(self, target: Target, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self._name = target.tls.server_name
        self._http = httpx2.AsyncClient(**_settings(target), transport=transport)

    async def complete(self, ask: Ask, timeout_s: float | None) -> Answer:
        return await self._call(completion_call(ask), timeout_s)

    async def score(self, ask: ScoreAsk, timeout_s: float | None) -> Score:
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
        within = None if timeout_s is None else timeout_s + _GRACE_S
        ends_at = None if within is None else time.monotonic() + within
        with _told_of(ask.request_id):
            async with self._http.stream(**_sent(call, timeout_s, self._name)) as response:
                if response.status_code != 200:
                    raise error_from(response.status_code, response.headers, await response.aread(), ask.request_id)
                async for data in response.aiter_bytes():
                    for event in reader.push(data):
                        yield event
                    if reader.ended:
                        return
                    if ends_at is not None and time.monotonic() > ends_at:
                        raise _too_late(ask.request_id)
        raise _cut_short(ask.request_id)

    async def close(self) -> None:
        await self._http.aclose()

    async def _call(self, call: HttpCall[Told], timeout_s: float | None, good: tuple[int, ...] = (200,)) -> Told:
        within = None if timeout_s is None else timeout_s + _GRACE_S
        with _told_of(call.request_id):
            async with asyncio.timeout(within):
                response = await self._http.request(**_sent(call, timeout_s, self._name))
        if response.status_code not in good:
            raise error_from(response.status_code, response.headers, response.content, call.request_id)
        return answer_in(call, response.content)
