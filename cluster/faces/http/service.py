"""The HTTP face: OpenAI's completions endpoint and a few small ones. Translates, delegates, translates back."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.faces.credentials import CHALLENGES
from cluster.faces.error_codes import CODES, Failure, SlowBody, describe
from cluster.faces.http.calls import CALL, Begun, begun, check_model
from cluster.faces.http.completion_bodies import chunk_body, encoded, error_body, trace_body, usage_event, whole_body
from cluster.faces.http.completions import CompletionCall, outside_problems, parse_call
from cluster.faces.http.cross_origin import CrossOrigin
from cluster.faces.http.gate import Gate
from cluster.faces.http.request_body import BodyReader
from cluster.faces.http.scores import ScoresFace
from cluster.faces.http.tokens import TokensFace
from cluster.runs.answer import Chunk, Piece, Usage
from cluster.runs.callers import KeyRefused
from cluster.runs.deadline import Deadline
from cluster.runs.echoing import Echoing
from cluster.runs.generation import Checked, Generation
from cluster.runs.run import Generating
from cluster.runs.streams import until_disconnect
from twotower.core import Mode
from twotower.errors import InvalidRequest
from twotower.showing import one_line

logger = logging.getLogger(__name__)

_READ = ["GET", "HEAD"]
_TRACE_EVENT = b"twotower.trace"
_LAST_WORDS_S = 2.0  # beyond its deadline, for a stream to say that it has passed

Item = TypeVar("Item")
Numbered = tuple[int, Piece]  # with its run's number
Write = Callable[[bytes], Awaitable[None]]


def make_app(
    generation: Generation,
    served: Callable[[], Set[Mode]],
    max_bytes: int = 4 * 2**20,
    body_timeout_s: float = 30.0,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The ASGI application of one router. `served`: the modes that are served now. `cors_origins`: whose pages may read
    its answers; `*` is everybody's."""
    app = FastAPI(title="TwoTower Serve", docs_url=None, redoc_url=None, openapi_url=None)
    bodies = BodyReader(max_bytes, body_timeout_s)
    face, scores = CompletionsFace(generation, bodies), ScoresFace(generation, bodies)
    tokens = TokensFace(generation, bodies)
    model = generation.model
    card: dict[str, object] = {"id": model.name, "object": "model", "created": int(time.time()), "owned_by": "twotower"}
    card["max_model_len"] = model.limits.max_sequence_length
    card["modes"] = [str(mode) for mode in model.limits.modes]
    card["checkpoint_fingerprint"] = model.fingerprint

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await face.answer(request)

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        return await scores.answer(request)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await tokens.tokenize(request)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await tokens.detokenize(request)

    @app.api_route("/tokenizer_info", methods=_READ)
    async def tokenizer_info() -> dict[str, object]:
        return tokens.info()

    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        raise InvalidRequest.of("messages", "this checkpoint has no chat template; use /v1/completions")

    @app.api_route("/v1/models", methods=_READ)
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [card]}

    @app.api_route("/v1/models/{name:path}", methods=_READ)
    async def one_model(name: str) -> dict[str, object]:
        check_model(name, model.name)
        return card

    @app.api_route("/health", methods=_READ)
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.api_route("/ready", methods=_READ)
    async def ready() -> Response:
        now = served()
        modes = {str(mode): mode in now for mode in model.limits.modes}
        if now:
            return JSONResponse({"status": "ready", "modes": modes})
        return JSONResponse({"status": "not ready", "modes": modes}, 503, headers={"Retry-After": "1"})

    @app.api_route("/version", methods=_READ)
    async def version() -> dict[str, str]:
        return {"version": model.version}

    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Gate, generation=generation)
    app.add_middleware(ErrorBoundary)
    if cors_origins:
        app.add_middleware(CrossOrigin, origins=cors_origins)
    return app


class CompletionsFace:
    """`/v1/completions`: whole answers and streams of server-sent events."""

    def __init__(self, generation: Generation, bodies: BodyReader) -> None:
        self._generation, self._bodies = generation, bodies

    async def answer(self, request: Request) -> Response:
        generation = self._generation
        began = await begun(request, generation, self._bodies)
        call = parse_call(began.body, began.outer_id)
        request.scope[CALL] = call.name
        check_model(call.model, generation.model.name)
        headers = began.headers(call.label or call.id)
        checked = await self._checked(call)
        with ExitStack() as held:
            with _told_of(0, 1):
                held.enter_context(generation.hold(checked, began.caller))
            if call.echo:
                return await self._echoed(request, call, checked, began, headers)
            runs = await self._runs(checked, began)
            pieces = generation.many(runs)
            if call.stream:
                first = await until_disconnect(request.receive, _next(pieces))
                write = partial(self._write, call, runs, first, pieces)
                return EventStream(write, pieces, headers, began.deadline, held.pop_all())
            await until_disconnect(request.receive, _drained(pieces))
        return await self._whole(call, runs, headers)

    async def _echoed(
        self,
        request: Request,
        call: CompletionCall,
        asks: Sequence[Checked],
        began: Begun,
        headers: Mapping[str, str],
    ) -> Response:
        """The prompts again, and their answers."""
        runs = []
        for place, checked in enumerate(asks):
            with _told_of(place, len(asks)):
                run = self._generation.echo_run(checked, call.answers, began.deadline, began.caller, began.parent)
                runs.append(await run)
        await until_disconnect(request.receive, _drained(self._generation.many(runs)))
        return await self._whole(call, runs, headers)

    async def _whole(
        self, call: CompletionCall, runs: Sequence[Generating | Echoing], headers: Mapping[str, str]
    ) -> Response:
        generation = self._generation
        whole = await whole_body(call, generation.model.name, int(time.time()), runs, generation.token_names)
        return Response(whole, headers=headers, media_type="application/json")

    async def _checked(self, call: CompletionCall) -> list[Checked]:
        checked = []
        for place, ask in enumerate(call.asks):
            with _told_of(place, len(call.asks)):
                checked.append(self._generation.check(ask))
            await asyncio.sleep(0)  # many prompts, one after the other, hold the loop up
        return checked

    async def _runs(self, asks: Sequence[Checked], began: Begun) -> list[Generating]:
        runs = []
        for place, checked in enumerate(asks):
            with _told_of(place, len(asks)):
                runs.append(await self._generation.run(checked, began.deadline, began.caller, began.parent))
        return runs

    async def _write(
        self,
        call: CompletionCall,
        runs: list[Generating],
        first: Numbered,
        rest: AsyncGenerator[Numbered, None],
        send: Write,
    ) -> None:
        """Server-sent events, one per piece; an error is an event too, and then there is no [DONE]."""
        name, created = self._generation.model.name, int(time.time())
        usages = [Usage(len(run.request.prompt_token_ids)) for run in runs]
        numbered: Numbered | None = first
        try:
            while numbered is not None:
                index, piece = numbered
                if isinstance(piece, Chunk):
                    usages[index] = piece.usage
                    told = usages if call.continuous_usage else None
                    names = self._generation.token_names
                    await send(_event(chunk_body(call, name, created, index, runs[index], piece, told, names)))
                else:
                    await send(_event(trace_body(call, index, piece, self._generation.token_texts), _TRACE_EVENT))
                numbered = await anext(rest, None)
            if call.include_usage:
                await send(_event(usage_event(call, name, created, usages)))
            await send(b"data: [DONE]\n\n")
        except Exception as error:
            await send(_event(error_body(describe(error, call.name))))


class EventStream(Response):
    """A stream of server-sent events whose source is closed at once when the client leaves, and then its room.

    A client that does not read is cut off when the deadline has passed.
    """

    def __init__(
        self,
        write: Callable[[Write], Awaitable[None]],
        source: AsyncGenerator[Any, None],
        headers: Mapping[str, str],
        deadline: Deadline,
        held: ExitStack,
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._write, self._source, self._held = write, source, held
        self._written_by = replace(deadline, ends_at=deadline.ends_at + _LAST_WORDS_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
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
            response = error_response(describe(error, scope.get(CALL, "")))
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
    response = JSONResponse(error_body(failure), status or failure.code.http, headers=headers)
    for challenge in CHALLENGES if failure.code is CODES[KeyRefused] else ():
        response.headers.append("WWW-Authenticate", challenge)
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    failure = Failure(CODES[InvalidRequest], one_line(f"{request.method} {request.url.path}: {error.detail}"))
    return error_response(failure, status=error.status_code)


@contextmanager
def _told_of(place: int, prompts: int) -> Iterator[None]:
    """What is wrong with one of the prompts, in the words of this face."""
    try:
        yield
    except InvalidRequest as error:
        raise outside_problems(error, place if prompts > 1 else None) from None


async def _next(items: AsyncGenerator[Item, None]) -> Item:
    return await anext(items)


async def _drained(items: AsyncGenerator[Item, None]) -> None:
    async with aclosing(items):
        async for _ in items:
            pass


def _event(body: object, name: bytes = b"") -> bytes:
    """One with a name is for those who listen for it."""
    return (b"event: " + name + b"\n" if name else b"") + b"data: " + encoded(body) + b"\n\n"
