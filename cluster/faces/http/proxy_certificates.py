"""The certificate that Serve's HTTP proxy shows, exchanged while the proxy runs: Serve reads the files once.

With Python's ssl a context that listens can hand each handshake to another one (`SSLContext.sni_callback`), which has
what the files say now. Knows where uvicorn keeps the connection of a request, and says so where it is not there.
"""

import asyncio
import logging
import ssl
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

_AGAIN_S = 1.0
_STAYS = "this proxy shows the certificate that it started with until it is started again"


class ProxyCertificates:
    """Middleware, the outermost one. The first request over TLS shows it what listens; from then on changed files count
    for new connections, and those that stand go on. Files that are wrong change nothing, and are told in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._has_looked = False
        self._keeping: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._has_looked and scope["type"] == "http":
            self._has_looked = True
            self._look(send)
        await self._app(scope, receive, send)

    def _look(self, send: Send) -> None:
        try:
            found = _listening(send)
        except (AttributeError, TypeError) as error:
            logger.error("%s: this uvicorn keeps its connections elsewhere: %s", _STAYS, error)
            return
        if found is not None:
            self._keeping = asyncio.create_task(_keep(*found))
            self._keeping.add_done_callback(_tell_its_end)


def _listening(send: Send) -> tuple[ssl.SSLContext, Path, Path] | None:
    """By a request's `send`, which is uvicorn's own: the context of TLS and the files of certificate and key. None: the
    proxy speaks no TLS. Raises AttributeError or TypeError where uvicorn is built otherwise."""
    transport = send.__self__.transport  # type: ignore[attr-defined]
    context = transport.get_extra_info("sslcontext")
    if context is None:
        return None
    config = transport.get_protocol().config
    return context, Path(config.ssl_certfile), Path(config.ssl_keyfile)


async def _keep(listening: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Runs forever."""
    from cluster.certificates import Files, contexts  # loads pydantic

    while True:
        try:
            shown = await asyncio.to_thread(contexts, Files(certificate, key, None))
            break
        except Exception as error:
            logger.error("the certificate that HTTP shows stays as it is: %s", error)
            await asyncio.sleep(_AGAIN_S)

    def show(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = shown.now

    listening.sni_callback = show
    await shown.watch()


def _tell_its_end(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("%s", _STAYS, exc_info=task.exception())
