"""The bound of path and headers. Serve's proxy has none: it passes on everything it has read."""

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.faces.error_codes import LongHead

MAX_HEAD = 64 * 1024  # bytes of path, query and headers


class HeadBound:
    """Middleware. Raises LongHead before anything else is done on the request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            size = len(scope["path"].encode()) + len(scope["query_string"])
            size += sum(len(name) + len(value) for name, value in scope["headers"])
            if size > MAX_HEAD:
                told = f"got {size} bytes of path, query and headers, wanted at most {MAX_HEAD}"
                raise LongHead.of("headers", told)
        await self._app(scope, receive, send)
