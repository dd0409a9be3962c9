"""The other routers, asked for their boards through a Serve handle: while somebody watches, and once at the start."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from cluster.board.part import CODEC, Part
from twotower.errors import TwoTowerError
from twotower.transport.codec import listed

logger = logging.getLogger(__name__)

ASKING_S = 2.0
# Asks every router for its Part, with the histories from these seconds on. This router is among them.
Ask = Callable[[Mapping[str, int]], Awaitable[list[bytes]]]


async def nobody(since: Mapping[str, int]) -> list[bytes]:
    """Where there is no other router."""
    return []


class ServeRouters:
    """All replicas of the deployment that this process is one of. The handle is made when it is first needed."""

    def __init__(self, deployment: str, application: str) -> None:
        self._names = deployment, application
        self._handle: Any = None

    async def __call__(self, since: Mapping[str, int]) -> list[bytes]:
        """Serve counts no call of a broadcast against a replica's bounds, so no request waits for it."""
        from ray import serve

        if self._handle is None:
            self._handle = serve.get_deployment_handle(*self._names)
        asked = self._handle.broadcast("board_part", dict(since))
        answers = await asked.results_async(timeout_s=ASKING_S, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, bytes)]


async def parts_of(ask: Ask, since: Mapping[str, int], own: str) -> list[Part]:
    """Of all routers that answer, but this one. One of another version whose word is not understood is left out."""
    parts = []
    try:
        async with asyncio.timeout(ASKING_S):
            answers = await ask(since)
    except Exception as error:
        logger.debug("the other routers do not answer: %s", error)
        return []
    for answer in answers:
        try:
            parts += CODEC.decode(listed([answer]))
        except TwoTowerError as error:
            logger.debug("a router's board is not understood: %s", error)
    return [part for part in parts if part.router.name != own]
