"""Who a call over HTTP is from. Where keys are wanted, nobody without one gets further."""

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.faces.credentials import key_of
from cluster.runs.callers import Caller
from cluster.runs.generation import Generation

_CALLER = "twotower.caller"
_OPEN = ("/health", "/ready")  # probes have no key


class Gate:
    """Middleware. Raises KeyRefused for all paths but those that say whether the service lives, and for what a page of
    elsewhere has a browser send with the key that it keeps. There are no websockets."""

    def __init__(self, app: ASGIApp, generation: Generation) -> None:
        self._app, self._generation = app, generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            headers = Headers(scope=scope)
            key = None if _from_elsewhere(headers) else key_of(headers.getlist("authorization"))
            scope[_CALLER] = self._generation.caller(key, scope["client"][0] if scope.get("client") else "")
        await self._app(scope, receive, send)


def _from_elsewhere(headers: Headers) -> bool:
    """Whether a browser sends it for another site's page. With `Bearer` that page knows the key itself."""
    kept = headers.get("authorization", "").strip().lower().startswith("basic")
    return kept and headers.get("sec-fetch-site", "none") not in ("same-origin", "none")


def caller_of(request: Request) -> Caller:
    """By its key, else by its address. Of a gateway's requests the proxy finds the clients' own where
    FORWARDED_ALLOW_IPS names it.

    Not the `user` of a body: whoever floods would write a new one on every request.
    """
    caller: Caller = request.scope[_CALLER]
    return caller
