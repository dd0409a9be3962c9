"""The caller of an HTTP call. If keys are required, a call without a key is refused here."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.faces.credentials import key_of
from cluster.runs.callers import Caller, KeyRefused
from cluster.runs.generation import Generation

_CALLER = "twotower.caller"
_OPEN = ("/health", "/ready")  # probes have no key


class Gate:
    """Middleware. Without a key it raises KeyRefused for all paths except those for probes. It also refuses a request
    that a foreign page makes a browser send with its stored key. There are no websockets.
    """

    def __init__(self, app: ASGIApp, generation: Generation) -> None:
        self._app, self._generation = app, generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            headers = Headers(scope=scope)
            if _from_elsewhere(scope["method"], headers):
                told = "a key that a browser keeps is accepted only from this service's own pages"
                raise KeyRefused(told, "another page")
            key = key_of(headers.getlist("authorization"))
            scope[_CALLER] = self._generation.caller(key, scope["client"][0] if scope.get("client") else "")
        await self._app(scope, receive, send)


def _from_elsewhere(method: str, headers: Headers) -> bool:
    """Whether a browser sends the request with its stored key for another site's page. Following a link to one of our
    pages does not count. With `Bearer` the page knows the key itself.
    """
    if not headers.get("authorization", "").strip().lower().startswith("basic"):
        return False
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is None:  # browsers send it over TLS and on loopback
        return origin is not None and urlsplit(origin).netloc != headers.get("host")
    follows_link = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
    return site not in ("same-origin", "none") and not follows_link


def caller_of(request: Request) -> Caller:
    """The caller by key, or else by address. Behind a gateway named in FORWARDED_ALLOW_IPS, the proxy finds the
    clients' own addresses.

    The `user` of a body does not count: a flooding client could send a new one with every request.
    """
    caller: Caller = request.scope[_CALLER]
    return caller
