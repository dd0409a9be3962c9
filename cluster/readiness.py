"""Whether a cell answers, asked again and again, so that health checks cost nothing."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from cluster.runs.cells import Cells

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
TIMEOUT_S = 2.5


class Readiness:
    """Watches the cells; `on_change` hears of every change."""

    def __init__(self, cells: Cells, on_change: Callable[[bool], Awaitable[None]] | None = None) -> None:
        self._cells, self._on_change = cells, on_change
        self._ready = self._closed = False

    def __call__(self) -> bool:
        return self._ready

    async def poll(self) -> None:
        """Ask once."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                ready = await self._cells.ready()
        except Exception as error:
            logger.debug("no cell answers: %s", error)
            ready = False
        await self._become(ready and not self._closed)

    async def close(self) -> None:
        """Not ready from now on, whatever the cells say."""
        self._closed = True
        await self._become(False)

    async def _become(self, ready: bool) -> None:
        if ready != self._ready:
            self._ready = ready
            logger.info("the service is %s", "ready" if ready else "not ready")
            if self._on_change is not None:
                await self._on_change(ready)

    async def watch(self) -> None:
        """Ask for ever."""
        while True:
            await self.poll()
            await asyncio.sleep(INTERVAL_S)
