"""The HTTP face: OpenAI's completions endpoint and a few small ones. Translates, delegates, translates back."""

import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.completion_bodies import chunk_body, error_body, usage_body, usage_event, whole_body
from cluster.completions import CompletionCall, outside_problems, parse_call
from cluster.deadline import Deadline
from cluster.error_codes import CODES, Failure, NoSuchModel, SlowBody, describe
from cluster.generation import Generation
from cluster.request_body import BodyReader
from cluster.runs.answer import Chunk, Usage
from cluster.runs.run import Generating
from cluster.streams import until_disconnect
from twotower.errors import InvalidRequest
from twotower.strict_json import PARSED_S, parse_json
from twotower.validation import one_line, show

logger = logging.getLogger(__name__)

TIMEOUT_HEADER = "x-request-timeout"
REQUEST_ID = "x-request-id"
_CALL = "twotower.call"  # where in a scope the log finds what the call is named
_READ = ["GET", "HEAD"]
_LAST_WORDS_S = 2.0  # beyond its deadline, for a stream to say that it has passed

Item = TypeVar("Item")
Piece = tuple[int, Chunk]  # with its run's number
Write = Callable[[bytes], Awaitable[None]]


def make_app(
    generation: Generation,
    is_ready: Callable[[], bool],
    max_bytes: int = 4 * 2**20,
    body_timeout_s: float = 30.0,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The ASGI application of one router. `cors_origins`: whose pages may read its answers; `*` is everybody's."""
    app = FastAPI(title="TwoTower Serve", docs_url=None, redoc_url=None, openapi_url=None)
    face = CompletionsFace(generation, BodyReader(max_bytes, body_timeout_s))
    model = generation.model
    card: dict[str, object] = {"id": model.name, "object": "model", "created": int(time.time()), "owned_by": "twotower"}
    card["max_model_len"] = model.limits.max_sequence_length
    card["modes"] = [str(mode) for mode in model.limits.modes]
    card["checkpoint_fingerprint"] = model.fingerprint

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await face.answer(request)

    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        raise InvalidRequest.of("messages", "this checkpoint has no chat template; use /v1/completions")

    @app.api_route("/v1/models", methods=_READ)
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [card]}

    @app.api_route("/v1/models/{name:path}", methods=_READ)
    async def one_model(name: str) -> dict[str, object]:
        _check_model(name, model.name)
        return card

    @app.api_route("/health", methods=_READ)
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.api_route("/ready", methods=_READ)
    async def ready() -> Response:
        if is_ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, 503, headers={"Retry-After": "1"})

    @app.api_route("/version", methods=_READ)
    async def version() -> dict[str, str]:
        return {"version": model.version}

    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(ErrorBoundary)
    if cors_origins:
        shown = (REQUEST_ID, "Retry-After")
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=shown,
        )
    return app


class CompletionsFace:
    """`/v1/completions`: whole answers and streams of server-sent events."""

    def __init__(self, generation: Generation, bodies: BodyReader) -> None:
        self._generation, self._bodies = generation, bodies

    async def answer(self, request: Request) -> Response:
        generation = self._generation
        deadline = generation.deadline(_timeout_of(request.headers))
        generation.admission.check_open()
        async with deadline.over():
            raw = await self._bodies.read(request)
        body = await generation.lanes.run(len(raw) * PARSED_S, partial(parse_json, raw), deadline)
        outer_id = request.headers.get(REQUEST_ID, "")
        call = parse_call(body, outer_id)
        request.scope[_CALL] = call.name
        _check_model(call.model, generation.model.name)
        # Serve's proxy sets this header itself, to what the request brought or to what it drew for it.
        headers = {} if outer_id else {REQUEST_ID: call.label or call.id}
        with ExitStack() as place:
            place.enter_context(self._place(call))
            runs = await self._runs(call, deadline)
            chunks = generation.many(runs)
            if call.stream:
                first = await until_disconnect(request.receive, _next(chunks))
                write = partial(self._write, call, runs, first, chunks)
                return EventStream(write, chunks, headers, deadline, place.pop_all())
            await until_disconnect(request.receive, _drained(chunks))
        return JSONResponse(whole_body(call, generation.model.name, int(time.time()), runs), headers=headers)

    def _place(self, call: CompletionCall) -> AbstractContextManager[None]:
        try:
            return self._generation.place(call.asks)
        except InvalidRequest as error:
            raise outside_problems(error) from None

    async def _runs(self, call: CompletionCall, deadline: Deadline) -> list[Generating]:
        runs = []
        for place, ask in enumerate(call.asks):
            try:
                runs.append(await self._generation.run(ask, deadline))
            except InvalidRequest as error:
                raise outside_problems(error, place if len(call.asks) > 1 else None) from None
        return runs

    async def _write(
        self, call: CompletionCall, runs: list[Generating], first: Piece, rest: AsyncGenerator[Piece, None], send: Write
    ) -> None:
        """Server-sent events, one per chunk; an error is an event too, and then there is no [DONE]."""
        name, created = self._generation.model.name, int(time.time())
        usages = [Usage(len(run.request.prompt_token_ids)) for run in runs]
        piece: Piece | None = first
        try:
            while piece is not None:
                index, chunk = piece
                usages[index] = chunk.usage
                body = chunk_body(call, name, created, index, runs[index], chunk)
                await send(_event(body | {"usage": usage_body(usages)} if call.continuous_usage else body))
                piece = await anext(rest, None)
            if call.include_usage:
                await send(_event(usage_event(call, name, created, usages)))
            await send(b"data: [DONE]\n\n")
        except Exception as error:
            await send(_event(error_body(describe(error, call.name))))


class EventStream(Response):
    """A stream of server-sent events whose source is closed at once when the client leaves, and then its place.

    A client that does not read is cut off when the deadline has passed.
    """

    def __init__(
        self,
        write: Callable[[Write], Awaitable[None]],
        source: AsyncGenerator[Any, None],
        headers: Mapping[str, str],
        deadline: Deadline,
        place: ExitStack,
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._write, self._source, self._place = write, source, place
        self._written_by = replace(deadline, ends_at=deadline.ends_at + _LAST_WORDS_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            async with aclosing(self._source), self._written_by.over():
                await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async def write(event: bytes) -> None:
            await send({"type": "http.response.body", "body": event, "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._write(write)
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
            response = error_response(describe(error, scope.get(_CALL, "")))
            if not started:
                await response(scope, receive, send)


def error_response(failure: Failure, status: int | None = None) -> Response:
    headers = {}
    if failure.retry_after_s is not None:
        headers["Retry-After"] = str(failure.retry_after_s)
    if failure.code.retry is not None:
        headers["x-should-retry"] = "true" if failure.code.retry else "false"  # OpenAI's SDKs obey it
    if failure.code is CODES[SlowBody]:
        headers["Connection"] = "close"  # the rest of the body may never come
    return JSONResponse(error_body(failure), status or failure.code.http, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    failure = Failure(CODES[InvalidRequest], one_line(f"{request.method} {request.url.path}: {error.detail}"))
    return error_response(failure, status=error.status_code)


def _check_model(got: str | None, served: str) -> None:
    if got not in (None, served):
        raise NoSuchModel.of("model", f"got {show(got)}, wanted {show(served)}, the one served here")


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


async def _next(items: AsyncGenerator[Item, None]) -> Item:
    return await anext(items)


async def _drained(items: AsyncGenerator[Item, None]) -> None:
    async with aclosing(items):
        async for _ in items:
            pass


def _event(body: Mapping[str, object]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
