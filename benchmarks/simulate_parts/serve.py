"""Ray Serve's part: its own request router over the cells, and its controller, which starts and ends them."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.autoscaling_policy import _apply_delay_logic
from ray.serve.request_router import PendingRequest

from benchmarks.simulate_parts.cell import SimCell, gone
from cluster.config import ServiceConfig
from cluster.runs import kept
from cluster.runs.messages import CELL_SILENCE_S, Message, Waits, Wishes
from cluster.runs.routing import ElsewhereFirst
from cluster.scaling import Policy
from twotower.core import AnyRequest

_CELL = DeploymentID("Cell", "twotower")
BEAT_S = LOAD_TOLD_S = 1.0
_NOTICED_S = 1.0  # of a process that is gone; Serve asks each second


class Replica:
    """As much of Serve's view of a cell as its router uses."""

    def __init__(self, cell: SimCell, hop_s: float) -> None:
        self.cell, self._hop_s = cell, hop_s
        self.replica_id = ReplicaID(cell.name, _CELL)
        self.max_ongoing_requests = cell.most_ongoing

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(2 * self._hop_s if self.cell.alive else deadline_s)
        return self.cell.held


class Lines:
    """Of one router to the cells: as `cluster.runs.router_lines` opens them, when a cell is first called."""

    def __init__(self, accept: Callable[[], Any], hop_s: float) -> None:
        self._accept, self._hop_s, self._loop = accept, hop_s, asyncio.get_running_loop()
        self._of: dict[str, Any] = {}

    def to(self, cell: SimCell) -> Any:
        if cell.name not in self._of:
            self._of[cell.name] = self._accept()
            self.say(cell, cell.beat())
        return self._of[cell.name]

    def say(self, cell: SimCell, message: Message) -> None:
        """It is heard a hop later."""
        if cell.name in self._of:
            self._loop.call_later(self._hop_s, self._take, cell.name, message)

    def _take(self, name: str, message: Message) -> None:
        line = self._of.get(name)
        if line is not None:
            line.take(message)

    def lose(self, cell: SimCell, reason: str) -> None:
        line = self._of.pop(cell.name, None)
        if line is not None:
            line.lost(reason)


class Handle:
    """A DeploymentHandle whose calls Serve's own router places, with our ranks."""

    def __init__(self, lines: Lines, hop_s: float, method: str = "", router: ElsewhereFirst | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._lines, self._hop_s, self._method = lines, hop_s, method
        self.router = router or ElsewhereFirst(
            _CELL, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True, get_curr_time_s=loop.time
        )
        self._calls = 0

    def _init(self, **_: object) -> None:
        """There is one loop anyway."""

    def options(self, method_name: str, **_: object) -> "Handle":
        return Handle(self._lines, self._hop_s, method_name, self.router)

    def remote(self, *args: Any) -> "asyncio.Task[Any]":
        return asyncio.get_running_loop().create_task(getattr(self, f"_{self._method}")(*args))

    async def _chosen(self, args: Sequence[Any]) -> SimCell:
        self._calls += 1
        name = f"{self._method}-{self._calls}"
        metadata = RequestMetadata(request_id=name, internal_request_id=name)
        replica: Any = await self.router._choose_replica_for_request(PendingRequest(list(args), {}, metadata))
        self.router.on_send_request(replica.replica_id)
        await asyncio.sleep(self._hop_s)
        cell: SimCell = replica.cell
        if not cell.alive:
            self.router.on_replica_actor_died(replica.replica_id)
            raise gone(cell.name)
        return cell

    async def _run(self, request: AnyRequest, timeout_s: float, reply_to: Any, wishes: Wishes) -> None:
        cell = await self._chosen((request, timeout_s, reply_to, wishes))
        replica_id = ReplicaID(cell.name, _CELL)
        self.router.on_new_queue_len_info(replica_id, cell.held + 1)
        self._lines.to(cell)
        over = cell.begin(request, reply_to.call, lambda message: self._lines.say(cell, message))
        try:
            await over
        finally:
            self.router.decrement_queue_len_cache(replica_id)
            if cell.alive and not over.done():
                cell.abandon(request.id)

    async def _served(self, address: Any, wishes: Wishes) -> tuple[Any, ...]:
        cell = await self._chosen((address, wishes))
        self._lines.to(cell)
        self.router.decrement_queue_len_cache(ReplicaID(cell.name, _CELL))
        return cell.beat().serves


@dataclass(frozen=True, slots=True)
class Pace:
    """Of the world around the policies. `hop_s`: one way between two processes; `start_s`: of a cell."""

    hop_s: float = 0.0005
    start_s: float = 90.0


class Controller:
    """Starts and ends cells: the product's policy, Serve's own delays, the configured bounds."""

    def __init__(
        self,
        config: ServiceConfig,
        make: Callable[[str], SimCell],
        pace: Pace,
        random: Random,
        scales: bool = True,
    ) -> None:
        self._config, self._make, self._pace, self._random, self._scales = config, make, pace, random, scales
        self._loop = asyncio.get_running_loop()
        cluster = config.cluster
        self._policy, self._state = Policy(cluster.target_fullness), dict[str, Any]()
        self._delays: Any = SimpleNamespace(
            upscale_delay_s=cluster.upscale_delay_s,
            downscale_delay_s=cluster.downscale_delay_s,
            downscale_to_zero_delay_s=None,
        )
        self.target = cluster.min_cells
        self.cells: dict[str, SimCell] = {}  # those that Serve keeps
        self.leaving: dict[str, SimCell] = {}
        self.ended: list[SimCell] = []
        self._starting: dict[str, asyncio.TimerHandle] = {}
        self._told: dict[str, dict[str, float]] = {}
        self._said_at: dict[str, float] = {}
        self._numbers = 0
        self._routers: list[Any] = []
        self.cuts = 0

    @property
    def starting(self) -> int:
        return len(self._starting)

    def join(self, routers: Iterable[Any], cells: int | None = None) -> None:
        """At the beginning: so many cells are there at once."""
        self._routers = list(routers)
        self.target = self.target if cells is None else cells
        for _ in range(self.target):
            self._numbers += 1
            self._add(f"cell{self._numbers}")
        self._tell_routers()
        self._loop.call_later(LOAD_TOLD_S, self._decide)

    def add_router(self, router: Any) -> None:
        self._routers.append(router)
        router.handle.router.update_replicas([Replica(cell, self._pace.hop_s) for cell in self.cells.values()])

    def kill(self, cell: SimCell, silent: bool) -> None:
        """Its machine is gone: its connections are reset, or (`silent`) nothing more is heard of it."""
        self.cells.pop(cell.name, None)
        self.leaving.pop(cell.name, None)
        self.ended.append(cell)
        cell.kill()
        for router in self._routers:
            self._loop.call_later(CELL_SILENCE_S if silent else 0.0, router.lines_to.lose, cell, "is gone")
        self._told.pop(cell.name, None)
        self._loop.call_later(_NOTICED_S, self._tell_routers)
        self._loop.call_later(_NOTICED_S, self._reconcile)

    def replace_all(self, at_once: int) -> None:
        """New settings, as Serve with `surge` brings them: new cells first, then the old ones go."""
        self._loop.create_task(self._roll(list(self.cells.values()), at_once))

    async def _roll(self, old: Sequence[SimCell], at_once: int) -> None:
        for first in range(0, len(old), at_once):
            batch = [cell for cell in old[first : first + at_once] if cell.name in self.cells]
            await asyncio.sleep(self._pace.start_s)
            for _ in batch:
                self._numbers += 1
                self._add(f"cell{self._numbers}")
            for cell in batch:
                self._leave(cell)
            self._tell_routers()

    def _add(self, name: str) -> None:
        cell = self._make(name)
        self.cells[name] = cell
        self._loop.call_later(self._random.random() * BEAT_S, self._beat, cell)
        self._loop.call_later(self._random.random() * LOAD_TOLD_S, self._tell_load, cell)

    def _beat(self, cell: SimCell) -> None:
        if cell.alive:
            beat = cell.beat()
            for router in self._routers:
                router.lines_to.say(cell, beat)
            self._loop.call_later(BEAT_S, self._beat, cell)

    def _tell_load(self, cell: SimCell) -> None:
        if cell.alive and not cell.draining:
            self._loop.create_task(self._load(cell))
            self._loop.call_later(LOAD_TOLD_S, self._tell_load, cell)

    async def _load(self, cell: SimCell) -> None:
        waits: list[Waits] = [router.waits_said for router in self._routers]
        self._told[cell.name] = await cell.load(waits)
        self._said_at[cell.name] = self._loop.time()

    def _decide(self) -> None:
        self._loop.call_later(LOAD_TOLD_S, self._decide)
        if not self._scales:
            return
        now, series = self._loop.time(), dict[str, dict[str, list[Any]]]()
        for name, load in self._told.items():
            if name in self.cells:
                for part, value in load.items():
                    point = SimpleNamespace(timestamp=self._said_at[name], value=value)
                    series.setdefault(part, {})[name] = [point]
        context = SimpleNamespace(
            raw_metrics=series, current_time=now, total_queued_requests=0.0, target_num_replicas=self.target
        )
        wanted, _ = self._policy(context)
        decided, self._state = _apply_delay_logic(wanted, self.target, self._delays, self._state, now)
        cluster = self._config.cluster
        self.target = min(max(decided, cluster.min_cells), cluster.max_cells)
        self._reconcile()

    def _reconcile(self) -> None:
        while len(self.cells) + len(self._starting) < self.target:
            self._numbers += 1
            name = f"cell{self._numbers}"
            self._starting[name] = self._loop.call_later(self._pace.start_s, self._started, name)
        over = len(self.cells) + len(self._starting) - self.target
        for name in list(self._starting)[::-1][: max(0, over)]:
            self._starting.pop(name).cancel()
            over -= 1
        if over > 0:
            for cell in self._random.sample(list(self.cells.values()), over):
                self._leave(cell)
            self._tell_routers()

    def _started(self, name: str) -> None:
        del self._starting[name]
        self._add(name)
        self._tell_routers()

    def _leave(self, cell: SimCell) -> None:
        del self.cells[cell.name]
        self._told.pop(cell.name, None)
        cell.draining = True
        self.leaving[cell.name] = cell
        self._loop.create_task(self._drained(cell))

    async def _drained(self, cell: SimCell) -> None:
        ends_at = self._loop.time() + self._config.cluster.drain_timeout_s
        while cell.alive and cell.held and self._loop.time() < ends_at:
            await asyncio.sleep(1.0)
        if not cell.alive:
            return
        if cell.held:
            self.cuts += cell.held
            cell.fail_all(gone(cell.name))
        cell.kill()
        self.leaving.pop(cell.name, None)
        self.ended.append(cell)
        for router in self._routers:
            router.lines_to.lose(cell, "has ended")

    def _tell_routers(self) -> None:
        kept.cells = frozenset(self.cells)
        for router in self._routers:
            replicas = [Replica(cell, self._pace.hop_s) for cell in self.cells.values()]
            router.handle.router.update_replicas(replicas)
