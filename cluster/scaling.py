"""How many cells there should be, by the cells' load.

Each second a cell gives Serve its `Load`, through Serve's `record_autoscaling_stats`. Ten times a second Serve's
controller asks the `Policy`. Serve applies the bounds and the delays (`min_cells`, `upscale_delay_s`, …).
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from cluster.runs.messages import Waits
from twotower.engine.handle import EngineStats
from twotower.engine.ledger import Ledger
from twotower.errors import TwoTowerError

MARGIN = 0.75  # cells end while the others stay below this share of the fullness that starts one
LONG_WAIT_S = 5.0  # a longer wait starts another cell, whatever the numbers say
WORKING = 0.5  # from this busy share on, full cells start another one, even if no request waits
SHED = 4  # one of so many cells ends at a time, while any request runs
_SILENCE_S = 5.0  # after this time a cell's report no longer counts
_ASKING_S = 1.0  # seconds that towers may take to answer
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Load:
    """A cell's load at a moment; all fields are numbers, as Serve requires.

    `pages`: the share of pages in use on the fullest tower. `busy`: the share of the last second in which the busiest
    tower computed. `routers_waiting`, `longest_wait_s`: of all requests that wait in the routers, which every cell
    knows.
    """

    slots: float
    running: float = 0.0
    waiting: float = 0.0
    pages: float = 0.0
    busy: float = 0.0
    routers_waiting: float = 0.0
    longest_wait_s: float = 0.0

    @property
    def full(self) -> float:
        """The used share of its scarcest resource."""
        return max(self.running / self.slots, self.pages)


def wanted(loads: Sequence[Load], target: int, fullness: float, queued: float = 0.0) -> int:
    """The wanted number of cells; `target`: running and starting cells. `queued`: requests that wait inside Serve.

    All running and waiting requests should fill the cells to `fullness`. There are fewer cells than now only if they
    stay well below it, and at most a quarter fewer than answer. On fewer cells each pass has more rows and takes
    longer, so more requests run at a time than before. The effect is seen before further cells end.
    """
    if not loads:
        return target
    full, running = sum(load.full for load in loads), sum(load.running for load in loads)
    each = full / running if running else 1 / max(load.slots for load in loads)
    waiting = sum(load.waiting for load in loads) + max(load.routers_waiting for load in loads) + queued
    need = full + waiting * each
    # Slots are no sign of a burst while towers stand still: their requests wait for a tower's replacement.
    works = bool(waiting) or max(load.busy for load in loads) >= WORKING
    up = math.ceil(need / (fullness if works else 1.0) - _ROUNDING)
    least = 1
    if max(load.longest_wait_s for load in loads) > LONG_WAIT_S:
        least = len(loads) + 1  # not one more for each second that cells take to start
    if max(up, least) > target:
        return max(up, least)
    down = math.ceil(need / (fullness * MARGIN) - _ROUNDING)
    if need:
        down = max(down, len(loads) - max(1, len(loads) // SHED))
    return min(target, max(down, least))


class Policy:
    """Serve's policy for cells. It goes to Serve's controller by value and lives there."""

    def __init__(self, fullness: float) -> None:
        self._fullness = fullness
        self._heard: dict[Any, tuple[float, float]] = {}  # by cell: its last report's time by its clock and by ours

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """`context`: an AutoscalingContext. Returns the wanted number, and no state for Serve."""
        loads = self._loads(context.raw_metrics or {}, context.current_time)
        queued = max(0.0, context.total_queued_requests or 0.0)
        return wanted(loads, context.target_num_replicas, self._fullness, queued), {}

    def _loads(self, series: dict[str, dict[Any, list[Any]]], now: float) -> list[Load]:
        """The last report of each cell that has reported lately. Hosts' clocks may differ, so only ours is compared."""
        names = [field.name for field in fields(Load)]
        cells = set(series.get(names[0], {}))
        loads, heard = [], {}
        for cell in cells:
            points = {name: series.get(name, {}).get(cell) for name in names}
            if not all(points.values()):
                continue
            last = {name: found[-1] for name, found in points.items() if found}
            said_at = last[names[0]].timestamp
            known = self._heard.get(cell)
            heard[cell] = known if known is not None and known[0] == said_at else (said_at, now)
            if now - heard[cell][1] <= _SILENCE_S:
                loads.append(Load(**{name: point.value for name, point in last.items()}))
        self._heard = heard
        return loads


class Meter:
    """Measures a cell's load. Shares of time cover the time since the last reading."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._read_at = clock()
        self._busy_s: list[float] = []
        self._pages = self._busy = 0.0

    async def read(
        self, ledger: Ledger, stats: Callable[[], Awaitable[Sequence[EngineStats]]], waits: Sequence[Waits]
    ) -> dict[str, float]:
        """A Load. `waits`: the waiting requests of each router. Towers that do not answer keep their last numbers."""
        try:
            async with asyncio.timeout(_ASKING_S):
                self._hear(await stats())
        except (TimeoutError, TwoTowerError):
            pass
        load = Load(
            slots=ledger.running + ledger.context.free_slots,
            running=ledger.running,
            waiting=ledger.waiting,
            pages=self._pages,
            busy=self._busy,
            routers_waiting=sum(router.requests for router in waits),
            longest_wait_s=max((router.longest_s for router in waits), default=0.0),
        )
        return asdict(load)

    def _hear(self, towers: Sequence[EngineStats]) -> None:
        now, busy_s = self._clock(), [tower.busy_s for tower in towers]
        passed_s = now - self._read_at
        if len(busy_s) == len(self._busy_s) and passed_s > 0:
            most = max((new - old for new, old in zip(busy_s, self._busy_s, strict=True)), default=0.0)
            self._busy = min(1.0, max(0.0, most / passed_s))  # a tower that was replaced counts from 0 again
        self._read_at, self._busy_s = now, busy_s
        self._pages = max(
            (1 - tower.free_pages / tower.total_pages for tower in towers if tower.total_pages), default=0.0
        )
