"""One cell of the service: a replica that holds one pair of towers."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from ray.util import get_current_placement_group, get_node_ip_address

from actors.process_logs import log_to_stderr
from actors.settings import CellSettings
from cluster.runs.messages import NO_WISHES, Beat, Failed, Placed, ReplyTo, Wishes, about
from cluster.runs.router_lines import RouterLines
from cluster.runs.signs import CellSign
from cluster.scaling import Meter
from cluster.watch.cell import CellWatch, Moment
from cluster.watch.tower_signs import TowerSigns, towers_of
from twotower.core import PARAMETERS, AnyRequest, FailureEvent, Mode, ScoreRequest, ToldEvent
from twotower.engine.handle import EngineStats
from twotower.engine.pair import Pair
from twotower.errors import TwoTowerError, Unavailable
from twotower.transport.handshake import Address

logger = logging.getLogger(__name__)

KNOWN = tuple(PARAMETERS)  # parameters of requests, in this version


class Running(Protocol):
    """A pair with its processes, as made by `actors.cell.start_pair`."""

    pair: Pair
    fingerprint: str
    vocabulary: str
    mended: int

    @property
    def homes(self) -> list[dict[str, str]]: ...

    @property
    def mending_s(self) -> float: ...

    def failure(self) -> str | None: ...

    def why_not(self, request: AnyRequest) -> str | None: ...

    def served(self) -> tuple[Mode, ...]: ...

    async def stats(self) -> list[EngineStats]: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class CellStats:
    """A moment of a cell: requests by its ledger, counters by its towers, where its processes run."""

    running: int
    waiting: int
    towers: tuple[EngineStats, ...]
    homes: tuple[dict[str, str], ...] = ()


async def _start(settings: CellSettings) -> Running:
    group = get_current_placement_group()
    assert group is not None, "a cell's replica is deployed with a placement group"
    # Imports torch here, because routers and `up` import this module without needing torch.
    from actors.cell import start_pair

    return await start_pair(settings, group)


class Cell:
    """Starts its pair when constructed (Serve awaits the constructor); decodes and scores on it until shut down."""

    async def __init__(  # type: ignore[misc]
        self,
        settings: CellSettings,
        start: Callable[[CellSettings], Awaitable[Running]] = _start,
        name: str = "cell",
        model: str = "",
    ) -> None:
        """`name`: unique among cells. `model`: the model's name in metrics."""
        log_to_stderr()
        self.name = name
        logger.info("starting %s towers from %s", settings.placement, settings.checkpoint)
        self._lines = RouterLines(self._beat)  # first: towers take long, and its files may be wrong
        self._running = await start(settings)
        self._node, self._placement = get_node_ip_address(), settings.placement
        self._signs = TowerSigns(towers_of(settings.placement, settings.denoisers_per_context))
        self._meter = Meter()
        self._watch = CellWatch(name, model)
        self._watch.start(self._moment)
        logger.info("the towers are ready")

    async def run(self, request: AnyRequest, timeout_s: float, reply_to: ReplyTo, wishes: Wishes = NO_WISHES) -> None:
        """Decode or score one request; its events go to the asking router. An error of ours is the last event.

        A cell that cannot serve the request refuses it. Raises Unavailable if the router is lost; the sequence is then
        freed.
        """
        line = await self._lines.to(reply_to.address)
        with line.held():
            failure = self._running.why_not(request)
            if failure is not None:
                error = Unavailable(f"this cell cannot serve: {failure}")
                await line.send(Failed(reply_to.call, FailureEvent(request.id, error)))
                return
            running = self._running
            placed = Placed(reply_to.call, self.name, running.fingerprint, running.vocabulary, KNOWN)
            await line.send(placed)
            async with aclosing(self.events(request, timeout_s)) as events:
                async for event in events:
                    await line.send(about(reply_to.call, event))

    async def events(self, request: AnyRequest, timeout_s: float) -> AsyncGenerator[ToldEvent | FailureEvent, None]:
        """Events of one request. An error of ours is the last of them, not an exception."""
        pair = self._running.pair
        try:
            if isinstance(request, ScoreRequest):
                yield await pair.score(request, timeout_s)
                return
            async with aclosing(pair.events(request, timeout_s)) as events:
                async for event in events:
                    yield event
        except TwoTowerError as error:
            yield FailureEvent(request.id, error)

    async def served(self, address: Address, wishes: Wishes = NO_WISHES) -> tuple[Mode, ...]:
        """The modes that the cell serves now. From now on the router at this address has a line to the cell."""
        await self._lines.to(address)
        return self._running.served()

    def _beat(self) -> Beat:
        ledger = self._running.pair.ledger
        return Beat(
            self.name,
            self._running.fingerprint,
            self._running.served(),
            ledger.running,
            ledger.waiting,
            ledger.running + ledger.context.free_slots,
            self._sign(),
        )

    def _sign(self) -> CellSign:
        running = self._running
        towers = self._signs.now(running.homes)
        return CellSign(self._node, self._placement, running.mending_s, running.mended, towers)

    async def stats(self) -> CellStats:
        ledger = self._running.pair.ledger
        towers, homes = tuple(await self._running.stats()), tuple(self._running.homes)
        return CellStats(ledger.running, ledger.waiting, towers, homes)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """This cell's numbers for cluster.scaling.Policy."""
        return await self._meter.read(self._running.pair.ledger, self._heard, self._lines.waits())

    async def _heard(self) -> list[EngineStats]:
        """The towers' counters, read once a second for all users."""
        towers = await self._running.stats()
        self._watch.hears(towers, [int(home["pid"]) for home in self._running.homes if home])
        self._signs.hears(towers, self._running.homes)
        return towers

    def _moment(self) -> Moment:
        ledger = self._running.pair.ledger
        return Moment(ledger.running, ledger.waiting, self._running.mending_s, self._running.mended)

    async def check_health(self) -> None:
        """Serve replaces a replica whose health check raises."""
        failure = self._running.failure()
        if failure is not None:
            raise RuntimeError(f"this cell cannot serve any more: {failure}")

    async def shutdown(self) -> None:
        """Ends the tower processes; running requests end with the reason."""
        self._watch.stop()
        try:
            await self._running.close()
        finally:
            await self._lines.close()
