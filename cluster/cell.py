"""One cell of the service: a replica that holds one pair of towers and answers for it."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from ray.util import get_current_placement_group

from actors.cell import start_pair
from actors.frames import LineAddress
from actors.process_logs import log_to_stderr
from actors.settings import CellSettings
from cluster.event_lines import EventLines, Placed, ReplyTo
from cluster.pulse import Beat
from twotower.core import AnswerEvent, AnyRequest, FailureEvent, ScoreRequest
from twotower.engine.handle import EngineStats
from twotower.engine.pair import Pair
from twotower.errors import TwoTowerError, Unavailable

logger = logging.getLogger(__name__)

Avoided = tuple[str, ...]  # the cells that a call should not go to: cluster.runs.routing obeys, and a cell ignores it


class Running(Protocol):
    """A pair with its processes, as `actors.cell.start_pair` gives it."""

    pair: Pair
    places: list[dict[str, str]]
    fingerprint: str

    def failure(self) -> str | None: ...

    async def stats(self) -> list[EngineStats]: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class CellStats:
    """A moment of a cell: requests by its ledger, counters by its towers, where its processes run."""

    running: int
    waiting: int
    towers: tuple[EngineStats, ...]
    places: tuple[dict[str, str], ...] = ()


async def _start(settings: CellSettings) -> Running:
    group = get_current_placement_group()
    assert group is not None, "a cell's replica is deployed with a placement group"
    return await start_pair(settings, group)


class Cell:
    """Starts its pair when constructed (Serve awaits the constructor); decodes and scores on it until shut down."""

    async def __init__(  # type: ignore[misc]
        self, settings: CellSettings, start: Callable[[CellSettings], Awaitable[Running]] = _start, name: str = "cell"
    ) -> None:
        """`name`: no other cell has it."""
        log_to_stderr()
        self.name = name
        logger.info("starting %s towers from %s", settings.placement, settings.checkpoint)
        self._running = await start(settings)
        self._lines = EventLines(self._beat)
        logger.info("the towers are ready")

    async def run(self, request: AnyRequest, timeout_s: float, reply_to: ReplyTo, avoid: Avoided = ()) -> None:
        """Decode or score one request; its events go to the router that asked. An error of ours is the last of them.

        A cell that cannot serve says so instead of taking it. Raises Unavailable where that router is gone; the
        sequence is given up.
        """
        line = await self._lines.to(reply_to.address)
        with line.held():
            failure = self._running.failure()
            if failure is not None:
                await line.send(
                    reply_to.key, FailureEvent(request.id, Unavailable(f"this cell cannot serve: {failure}"))
                )
                return
            await line.send(reply_to.key, Placed(self.name, self._running.fingerprint))
            async with aclosing(self.events(request, timeout_s)) as events:
                async for event in events:
                    await line.send(reply_to.key, event)

    async def events(self, request: AnyRequest, timeout_s: float) -> AsyncGenerator[AnswerEvent | FailureEvent, None]:
        """Events of one request. An error of ours is the last of them, not an exception."""
        pair = self._running.pair
        try:
            if isinstance(request, ScoreRequest):
                yield await pair.score(request, timeout_s)
                return
            async with aclosing(pair.generate(request, timeout_s)) as events:
                async for event in events:
                    yield event
        except TwoTowerError as error:
            yield FailureEvent(request.id, error)

    async def ready(self, address: LineAddress, avoid: Avoided = ()) -> bool:
        """Whether it serves. The router at this address has a line to it from now on."""
        await self._lines.to(address)
        return self._running.failure() is None

    def _beat(self) -> Beat:
        ledger, serves = self._running.pair.ledger, self._running.failure() is None
        return Beat(self.name, serves, ledger.running, ledger.waiting, ledger.running + ledger.context.slots)

    async def stats(self) -> CellStats:
        ledger = self._running.pair.ledger
        towers, places = tuple(await self._running.stats()), tuple(self._running.places)
        return CellStats(ledger.running, ledger.waiting, towers, places)

    async def check_health(self) -> None:
        """Serve replaces a replica whose health check raises."""
        failure = self._running.failure()
        if failure is not None:
            raise RuntimeError(f"this cell cannot serve any more: {failure}")

    async def shutdown(self) -> None:
        """Ends the tower processes; what still runs is told why."""
        try:
            await self._running.close()
        finally:
            await self._lines.close()
