"""The HTTP face: OpenAI's endpoints for completions and chats, and a few small ones; its errors."""

import time
from collections.abc import Callable, Sequence, Set

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.faces.credentials import CHALLENGES
from cluster.faces.error_codes import CODES, Failure, SlowBody, describe
from cluster.faces.http.answer_bodies import error_body
from cluster.faces.http.answers import AnswersFace
from cluster.faces.http.calls import CALL, check_model
from cluster.faces.http.chat_bodies import ChatBodies
from cluster.faces.http.chats import parse_chat
from cluster.faces.http.completion_bodies import CompletionBodies
from cluster.faces.http.completions import parse_call
from cluster.faces.http.cross_origin import CrossOrigin
from cluster.faces.http.docs_page import add_docs
from cluster.faces.http.gate import Gate
from cluster.faces.http.request_body import BodyReader
from cluster.faces.http.request_head import HeadBound
from cluster.faces.http.scores import ScoresFace
from cluster.faces.http.tokens import TokensFace
from cluster.runs.callers import KeyRefused
from cluster.runs.generation import Generation
from twotower.core import Mode
from twotower.errors import InvalidRequest
from twotower.showing import one_line

_READ = ["GET", "HEAD"]


def make_app(
    generation: Generation,
    served: Callable[[], Set[Mode]],
    max_bytes: int = 4 * 2**20,
    body_timeout_s: float = 30.0,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The ASGI application of one router. `served`: the modes that are served now. `cors_origins`: origins whose pages
    may read its answers; `*`: all.
    """
    app = FastAPI(title="TwoTower Serve", docs_url=None, redoc_url=None, openapi_url=None)
    bodies = BodyReader(max_bytes, body_timeout_s)
    texts = AnswersFace(generation, bodies, parse_call, CompletionBodies)
    chats = AnswersFace(generation, bodies, parse_chat, ChatBodies)
    scores, tokens = ScoresFace(generation, bodies), TokensFace(generation, bodies)
    model = generation.model
    card: dict[str, object] = {"id": model.name, "object": "model", "created": int(time.time()), "owned_by": "twotower"}
    card["max_model_len"] = model.limits.max_sequence_length
    card["modes"] = [str(mode) for mode in model.limits.modes]
    card["checkpoint_fingerprint"] = model.fingerprint

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await texts.answer(request)

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
    async def chat_completions(request: Request) -> Response:
        return await chats.answer(request)

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

    add_docs(app)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Gate, generation=generation)
    app.add_middleware(HeadBound)
    app.add_middleware(ErrorBoundary)
    if cors_origins:
        app.add_middleware(CrossOrigin, origins=cors_origins)
    return app


class ErrorBoundary:
    """Middleware: turns every error inside into an error in OpenAI's shape, never a traceback."""

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
