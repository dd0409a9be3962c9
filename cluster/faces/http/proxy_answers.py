"""Replaces the own answers of Serve's HTTP proxy by ours: no router, a dead router, a cut stream.

Serve loads `middlewares` in its proxies, by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. Imports nothing heavy.
"""

import json

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.faces.error_shape import error_shape
from cluster.faces.http.cross_origin import CrossOrigin, Readers
from cluster.faces.http.proxy_certificates import ProxyCertificates
from cluster.runs.labels import REQUEST_ID, label_of

_RETRY_AFTER_S = 5
_SERVES_OWN = "/-/"  # its paths for probes and routes
_NO_ROUTER = "no router can take this request now"
_GONE = "the router that had this request is gone"
_KIND = "unavailable_error"


def middlewares() -> list[Middleware]:
    return [Middleware(ProxyAnswers), Middleware(ProxyCertificates)]  # the last one is the outermost


class ProxyAnswers:
    """Middleware around Serve's proxy. A router's own answers pass unchanged: its errors are never plain text."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._readers = Readers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_SERVES_OWN):
            await self._app(scope, receive, send)
            return
        scope = _without_unusable_label(scope)
        answer = _Answer(send)
        try:
            await self._app(scope, receive, answer.pass_on)
        finally:
            await self._finish(answer, scope, receive, send)

    async def _finish(self, answer: "_Answer", scope: Scope, receive: Receive, send: Send) -> None:
        """Completes the answer. A page that may read a router's answers may read ours."""
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if answer.started is None:
            # Serve has put an id there if the client did not.
            ours: ASGIApp = _unavailable(_NO_ROUTER if answer.replaced else _GONE, headers.get(REQUEST_ID, ""))
            if origin is not None and self._readers.may_read(origin):
                ours = CrossOrigin(ours, [origin])
            await ours(scope, receive, send)
            return
        if origin is not None:
            self._readers.note(origin, answer.started.get("access-control-allow-origin"))
        await answer.end_stream()


def _without_unusable_label(scope: Scope) -> Scope:
    """Serve repeats the x-request-id that it gets. Without one it draws one, and it shall do so here."""
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name != REQUEST_ID.encode() or label_of(value.decode("latin-1"))
    ]
    return {**scope, "headers": headers}


class _Answer:
    """One answer on its way from the proxy to the client.

    `started`: its headers, once they are sent. `replaced`: it is Serve's own answer and is held back.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started: Headers | None = None
        self.replaced = self._ended = False

    async def pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            self.replaced = message["status"] >= 400 and _kind(headers).startswith("text/plain")
            self.started = None if self.replaced else headers
        if self.replaced:
            return
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def end_stream(self) -> None:
        """Adds an error event if a stream ends too early."""
        if self.started is not None and _kind(self.started).startswith("text/event-stream") and not self._ended:
            event = b"data: " + json.dumps(error_shape(_GONE, _KIND)).encode() + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _kind(headers: Headers) -> str:
    return headers.get("content-type", "")


def _unavailable(message: str, request_id: str) -> JSONResponse:
    headers = {"retry-after": str(_RETRY_AFTER_S), "x-should-retry": "true", REQUEST_ID: request_id}
    return JSONResponse(error_shape(message, _KIND), 503, headers)
