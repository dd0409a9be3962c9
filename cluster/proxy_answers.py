"""What Serve's HTTP proxy answers by itself, in our words: no router there, one that died, a stream cut short.

Serve loads `middlewares` in its proxies, by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. Imports nothing heavy.
"""

import json

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_RETRY_AFTER_S = 5
_SERVES_OWN = "/-/"  # its paths for probes and routes
_NO_ROUTER = "no router can take this request now"
_GONE = "the router that had this request is gone"


def middlewares() -> list[Middleware]:
    return [Middleware(ProxyAnswers)]


class ProxyAnswers:
    """Middleware around Serve's proxy. A router's own answers pass as they are: they are never plain text."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_SERVES_OWN):
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            await self._app(scope, receive, answer.pass_on)
        finally:
            # Serve has put it there where the client did not.
            await answer.finish(Headers(scope=scope).get("x-request-id", ""))


class _Answer:
    """One answer on its way from the proxy to the client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = self._ended = self._is_stream = self._replaced = False

    async def pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self._replaced = message["status"] >= 400 and kind.startswith("text/plain")
            self._is_stream = kind.startswith("text/event-stream")
        if self._replaced:
            return
        self._started = True
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def finish(self, request_id: str) -> None:
        """What the proxy left out."""
        if not self._started:
            await self._send_error(_NO_ROUTER if self._replaced else _GONE, request_id)
        elif self._is_stream and not self._ended:
            event = b"data: " + _error(_GONE) + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def _send_error(self, message: str, request_id: str) -> None:
        body = _error(message)
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "retry-after": str(_RETRY_AFTER_S),
            "x-should-retry": "true",
            "x-request-id": request_id,
        }
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 503, "headers": raw})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _error(message: str) -> bytes:
    """As cluster/completion_bodies.py has it."""
    return json.dumps(
        {"error": {"message": message, "type": "unavailable_error", "param": None, "code": None}}
    ).encode()
