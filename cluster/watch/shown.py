"""The certificate that this node's HTTP proxy shows: seen in a handshake, since another process shows it."""

import asyncio
import logging
import ssl
from datetime import datetime

from cluster.certificates import end_of

logger = logging.getLogger(__name__)

_LOOK_S, _WITHIN_S = 30.0, 5.0
_MISSED = 3  # looks without an answer, after which nothing is known any more
_OWN = {"0.0.0.0": "127.0.0.1", "::": "::1"}
# A request, because the proxy looks for its changed files from the first one on.
_REQUEST = b"GET /-/healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class ShownOverHttp:
    """`until`: when the certificate ends. None while no proxy answers, as on a node without one."""

    def __init__(self, host: str, port: int) -> None:
        """`host`: where the proxies listen."""
        self._host, self._port = _OWN.get(host, host), port
        self.until: datetime | None = None
        self._missed = 0
        # Nothing secret is sent: the certificate is only looked at.
        self._any = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._any.check_hostname, self._any.verify_mode = False, ssl.CERT_NONE

    async def watch(self) -> None:
        """Runs forever."""
        while True:
            try:
                await self.look()
            except Exception:
                logger.exception("the certificate that HTTP shows cannot be read")
            await asyncio.sleep(_LOOK_S)

    async def look(self) -> None:
        """A proxy that does not answer leaves `until` as it was; the third time in a row `until` is None."""
        try:
            async with asyncio.timeout(_WITHIN_S):
                reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._any)
                try:
                    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
                    writer.write(_REQUEST)
                    await reader.readline()
                finally:
                    writer.transport.abort()
        except OSError:  # includes errors of time and of TLS
            self._missed += 1
            self.until = self.until if self._missed < _MISSED else None
            return
        self.until, self._missed = end_of(shown), 0
