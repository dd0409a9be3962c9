"""The modes that the cells serve, polled regularly, so that health checks cost nothing."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Set

from cluster.runs.cells import Cells
from twotower.core import Mode

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
TIMEOUT_S = 2.5


class Readiness:
    """Watches the cells: the modes that are served now; none if the service is not ready. `on_change` is called at
    every change.
    """

    def __init__(self, cells: Cells, on_change: Callable[[Set[Mode]], Awaitable[None]] | None = None) -> None:
        self._cells, self._on_change = cells, on_change
        self._served: Set[Mode] = frozenset()
        self._closed = False

    def __call__(self) -> Set[Mode]:
        return self._served

    async def poll(self) -> None:
        """Ask once."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                served = await self._cells.served()
        except Exception as error:
            logger.debug("no cell answers: %s", error)
            served = frozenset()
        await self._become(frozenset() if self._closed else frozenset(served))

    async def close(self) -> None:
        """Not ready from now on, whatever the cells report."""
        self._closed = True
        await self._become(frozenset())

    async def _become(self, served: Set[Mode]) -> None:
        if served != self._served:
            self._served = served
            logger.info("the service is %s", f"ready for {', '.join(sorted(served))}" if served else "not ready")
            if self._on_change is not None:
                await self._on_change(served)

    async def watch(self) -> None:
        """Ask forever."""
        while True:
            await self.poll()
            await asyncio.sleep(INTERVAL_S)
