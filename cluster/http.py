"""The HTTP face: OpenAI's completions endpoint and a few small ones. Translates, delegates, translates back."""

import json
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.completion_bodies import chunk_body, error_body, usage_event, whole_body
from cluster.completions import CompletionCall, outside_problems, parse_call
from cluster.deadline import Deadline
from cluster.error_codes import CODES, Failure, describe
from cluster.generation import Answer, Chunk, Generation, Order
from cluster.streams import until_disconnect
from twotower.errors import Cancelled, InvalidRequest
from twotower.strict_json import PARSED_S, parse_json
from twotower.validation import one_line, show

logger = logging.getLogger(__name__)

TIMEOUT_HEADER = "x-request-timeout"
_MEGABYTE = 2**20

Item = TypeVar("Item")


def make_app(generation: Generation, is_ready: Callable[[], bool], max_bytes: int = 4 * _MEGABYTE) -> FastAPI:
    """The ASGI application of one router."""
    app = FastAPI(title="TwoTower Serve", docs_url=None, redoc_url=None, openapi_url=None)
    face = CompletionsFace(generation, max_bytes)
    model = generation.model
    created = int(time.time())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await face.answer(request)

    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        raise InvalidRequest.of("messages", "this checkpoint has no chat template; use /v1/completions")

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        card = {"id": model.name, "object": "model", "created": created, "owned_by": "twotower"}
        card["max_model_len"] = model.limits.max_sequence_length
        card["modes"] = [str(mode) for mode in model.limits.modes]
        card["checkpoint_fingerprint"] = model.fingerprint
        return {"object": "list", "data": [card]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        if is_ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, 503, headers={"Retry-After": "1"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": model.version}

    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(ErrorBoundary)
    return app


class CompletionsFace:
    """`/v1/completions`: whole answers and streams of server-sent events."""

    def __init__(self, generation: Generation, max_bytes: int) -> None:
        self._generation, self._max_bytes = generation, max_bytes

    async def answer(self, request: Request) -> Response:
        deadline = self._generation.deadline(_timeout_of(request.headers))
        async with deadline.over():
            raw = await _read(request, self._max_bytes)
        body = await self._generation.lanes.run(len(raw) * PARSED_S, partial(parse_json, raw), deadline)
        call = parse_call(body, request.headers.get("x-request-id") or f"cmpl-{uuid.uuid4().hex}")
        if call.model not in (None, self._generation.model.name):
            return _no_such_model(call.model, self._generation.model.name)
        orders = await self._orders(call, deadline)
        chunks = self._generation.many(orders, deadline)
        headers = {"x-request-id": call.request_id}
        if call.stream:
            first = await until_disconnect(request.receive, _next(chunks))
            return EventStream(self._events(call, orders, first, chunks), chunks, headers)
        answers = await until_disconnect(request.receive, _collect(orders, chunks))
        name, created = self._generation.model.name, int(time.time())
        return JSONResponse(whole_body(call, name, created, orders, answers), headers=headers)

    async def _orders(self, call: CompletionCall, deadline: Deadline) -> list[Order]:
        orders = []
        for place, ask in enumerate(call.asks):
            try:
                orders.append(await self._generation.order(ask, deadline))
            except InvalidRequest as error:
                raise outside_problems(error, place if len(call.asks) > 1 else None) from None
        return orders

    async def _events(
        self,
        call: CompletionCall,
        orders: list[Order],
        first: tuple[int, Chunk],
        chunks: AsyncGenerator[tuple[int, Chunk], None],
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events, one per chunk; an error is an event too, and then there is no [DONE]."""
        name, created = self._generation.model.name, int(time.time())
        usages = [Answer.to(order).usage for order in orders]
        try:
            async for index, chunk in _with_first(first, chunks):
                usages[index] = chunk.usage
                yield _event(chunk_body(call, name, created, index, orders[index], chunk))
            if call.include_usage:
                yield _event(usage_event(call, name, created, usages))
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield _event(error_body(describe(error, call.request_id)))


class EventStream(Response):
    """A stream of server-sent events whose source is closed at once when the client leaves."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None], headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events, self._source = events, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source), aclosing(self._events):
            await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class ErrorBoundary:
    """Middleware: whatever goes wrong inside becomes an error in OpenAI's shape, never a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noting_start)
        except Exception as error:
            if scope["type"] != "http":
                raise
            response = error_response(describe(error))
            if not started:
                await response(scope, receive, send)


def error_response(failure: Failure, code: str | None = None, status: int | None = None) -> Response:
    headers = {}
    if failure.code.retry_after_s is not None:
        headers["Retry-After"] = str(failure.code.retry_after_s)
    return JSONResponse(error_body(failure, code), status or failure.code.http, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    failure = Failure(CODES[InvalidRequest], one_line(f"{request.method} {request.url.path}: {error.detail}"))
    return error_response(failure, status=error.status_code)


def _no_such_model(got: str | None, served: str) -> Response:
    failure = describe(InvalidRequest.of("model", f"got {show(got)}, wanted {show(served)}, the one served here"))
    return error_response(failure, "model_not_found", 404)


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                raise InvalidRequest.of("body", f"got more than {max_bytes} bytes, wanted at most that many")
    except ClientDisconnect:
        raise Cancelled("the client has disconnected before its request was whole") from None
    return bytes(body)


def _timeout_of(headers: Mapping[str, str]) -> float | None:
    """Seconds the client will wait; None where it does not say."""
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidRequest.of(TIMEOUT_HEADER, f"got {show(text)}, wanted a positive number of seconds")
    return seconds


async def _collect(orders: list[Order], chunks: AsyncGenerator[tuple[int, Chunk], None]) -> list[Answer]:
    answers = [Answer.to(order) for order in orders]
    async with aclosing(chunks):
        async for index, chunk in chunks:
            answers[index].add(chunk)
    return answers


async def _next(items: AsyncGenerator[Item, None]) -> Item:
    return await anext(items)


async def _with_first(first: Item, rest: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    yield first
    async for item in rest:
        yield item


def _event(body: Mapping[str, object]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
