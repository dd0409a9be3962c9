"""The ops page over HTTP: `/ops`, `/ops/snapshot` and `/ops/stream`. Reads only; nothing of it changes the service."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from cluster.board.feed import NEWS_S, Feed, Message
from cluster.board.page import page
from cluster.runs.streams import until_disconnect
from twotower.errors import InvalidRequest
from twotower.showing import show

_READ = ["GET", "HEAD"]
_FRESH = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
_WRITTEN_S = 5.0  # a watcher that takes a message later than this is dropped
_AGAIN_MS = 1000  # after which a browser whose stream has ended asks for another


def add_ops(app: FastAPI, feed: Feed, keys: bool = False) -> None:
    """Adds the paths to a router's application. `keys`: whether the service requires keys."""
    shown = page(keys)

    @app.api_route("/ops", methods=_READ)
    async def ops() -> Response:
        headers = _FRESH | {"content-security-policy": shown.policy, "referrer-policy": "no-referrer"}
        return Response(shown.html, headers=headers, media_type="text/html")

    @app.api_route("/ops/snapshot", methods=_READ)
    async def snapshot(request: Request) -> Response:
        whole = await feed.now(_second("since", request.query_params.get("since", "0")))
        return Response(whole.encoded(), headers=_FRESH, media_type="application/json")

    @app.get("/ops/stream")
    async def stream(request: Request) -> Response:
        """A reader that already has a part says up to when, so the end of a stream costs its reader nothing."""
        known = _second("last-event-id", request.headers.get("last-event-id", "0"))
        messages = feed.watch(max(0, known - NEWS_S))
        return SnapshotStream(await anext(messages), messages)


class SnapshotStream(Response):
    """Server-sent events until the watcher leaves or is too slow."""

    def __init__(self, first: Message, rest: AsyncGenerator[Message, None]) -> None:
        super().__init__(headers=_FRESH, media_type="text/event-stream")
        del self.headers["content-length"]
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _write(send, b"retry: %d\n\n" % _AGAIN_MS + _event(self._first))
        async for message in self._rest:
            await _write(send, _event(message))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _write(send: Send, event: bytes) -> None:
    async with asyncio.timeout(_WRITTEN_S):
        await send({"type": "http.response.body", "body": event, "more_body": True})


def _event(message: Message) -> bytes:
    return b"id: %d\ndata: %b\n\n" % (message.at, message.body)


def _second(name: str, text: str) -> int:
    """Seconds since the epoch. Raises InvalidRequest."""
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise InvalidRequest.of(name, f"got {show(text)}, wanted seconds since 1970, such as 1790000000")
    return int(text)
