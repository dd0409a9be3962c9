"""Which web pages may read answers in a browser (CORS), and what they may send. Imports nothing heavy."""

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from cluster.faces.error_shape import error_shape
from cluster.runs.labels import REQUEST_ID

_METHODS = ("GET", "HEAD", "POST")
_READABLE = (REQUEST_ID, "Retry-After", "x-should-retry")


class CrossOrigin(CORSMiddleware):
    """Starlette's middleware, for pages of these origins (`*`: all). Its refusals look like all other errors."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(app, origins, _METHODS, allow_headers=("*",), expose_headers=_READABLE)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        body = error_shape(bytes(response.body).decode(), "invalid_request_error")
        refusal = JSONResponse(body, response.status_code)
        refusal.headers["vary"] = response.headers["vary"]
        return refusal


class Readers:
    """The origins that may read answers, learned from routers' answers, because a proxy does not know the
    configuration.
    """

    def __init__(self) -> None:
        self._everybody = False
        self._origins: set[str] = set()  # at most the configured origins

    def note(self, origin: str, allowed: str | None) -> None:
        """A router has answered a page of `origin`; `allowed` is the answer's access-control-allow-origin."""
        self._everybody = allowed == "*"
        if allowed == origin:
            self._origins.add(origin)
        else:
            self._origins.discard(origin)

    def may_read(self, origin: str) -> bool:
        return self._everybody or origin in self._origins
