"""The certificate that this node's HTTP proxy shows: seen in a handshake, since another process shows it."""

import asyncio
import ssl
from datetime import datetime

from cluster.certificates import end_of

_LOOK_S, _WITHIN_S = 30.0, 5.0
_OWN = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ShownOverHttp:
    """`until`: when it ends. None while no proxy has answered, as on a node that has none."""

    def __init__(self, host: str, port: int) -> None:
        """`host`: where the proxies listen."""
        self._host, self._port = _OWN.get(host, host), port
        self.until: datetime | None = None

    async def watch(self) -> None:
        """Runs forever."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_S)

    async def look(self) -> None:
        """Whoever does not answer leaves it as it was."""
        try:
            async with asyncio.timeout(_WITHIN_S):
                _, writer = await asyncio.open_connection(self._host, self._port, ssl=_any_certificate())
        except OSError:  # of time and of TLS too
            return
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.transport.abort()
        self.until = end_of(shown)


def _any_certificate() -> ssl.SSLContext:
    """Nothing secret is said: the certificate is only looked at."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
