"""One cell's metrics: how full it is, whether it is mending, and its towers' counters."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.watch import cell_metrics as metrics
from cluster.watch.metric import Metric
from cluster.watch.ray_exporter import RayExporter
from cluster.watch.router_metrics import WAITING
from cluster.watch.tally import Exporter, Tally, flush_for_ever
from twotower.engine.handle import EngineStats

_SILENCE_S = 5.0  # after this time a tower's numbers no longer count
_COUNTED: dict[Metric, Callable[[EngineStats], float]] = {
    metrics.BUSY: lambda tower: tower.busy_s,
    metrics.TICKS: lambda tower: tower.ticks,
    metrics.ROWS: lambda tower: tower.rows,
    metrics.NEAR_TIES: lambda tower: tower.near_ties,
    metrics.OUT_OF_MEMORY: lambda tower: tower.out_of_memory,
}
_OF_LINKS: dict[Metric, Callable[[EngineStats], float]] = {
    metrics.EXCHANGED: lambda tower: tower.exchange_bytes,
    metrics.PAYLOADS: lambda tower: tower.exchange_payloads,
    metrics.EXCHANGE_TIME: lambda tower: tower.exchange_s,
}
_OF_PREFIXES: dict[Metric, Callable[[EngineStats], float]] = {
    metrics.PREFIX_LOOKUPS: lambda tower: tower.prefix_lookups,
    metrics.PREFIX_HITS: lambda tower: tower.prefix_hits,
    metrics.PREFIX_TOKENS: lambda tower: tower.prefix_positions,
    metrics.PREFIX_EVICTIONS: lambda tower: tower.prefix_evictions,
}
_EXPOSED: dict[str, Callable[[EngineStats], float]] = {
    "commit": lambda tower: tower.held_up_s,
    "prompt": lambda tower: tower.prompt_wait_s,
}


@dataclass(frozen=True, slots=True)
class Moment:
    """A cell now. `mending_s`: how long it has been replacing a lost tower; 0 while it is whole. `mended`: how often it
    has done so.
    """

    running: int
    waiting: int
    mending_s: float
    mended: int


class CellWatch:
    """Call `start` in the cell's event loop, and `hears` with the towers' answers whenever they were asked."""

    def __init__(
        self,
        cell: str,
        model: str,
        exporter: Exporter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cell, self._exporter, self._clock = cell, exporter or RayExporter({"model_name": model}), clock
        self._heard_at = clock()
        self._tally = Tally()
        self._told: dict[tuple[int, str], EngineStats] = {}  # by process and tower
        self._gauges: list[tuple[Metric, str]] = []
        self._mended = 0
        self._flushing: asyncio.Task[None] | None = None
        self._tally.add(metrics.MENDED, 0, cell)

    def start(self, now: Callable[[], Moment]) -> None:
        self._flushing = asyncio.create_task(flush_for_ever(self._tally, self._exporter, lambda: self.read(now())))

    def stop(self) -> None:
        """Stop, after a last flush."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._tally.flush(self._exporter)

    def read(self, moment: Moment) -> None:
        self._tally.set(metrics.RUNNING, moment.running, self._cell)
        self._tally.set(WAITING, moment.waiting, self._cell)
        self._tally.set(metrics.MENDING, moment.mending_s, self._cell)
        self._tally.add(metrics.MENDED, moment.mended - self._mended, self._cell)
        self._mended = moment.mended
        if self._clock() - self._heard_at > _SILENCE_S:
            self._forget_gauges()

    def hears(self, towers: Sequence[EngineStats], processes: Sequence[int]) -> None:
        """`processes`: ids of the cell's tower processes, in the cell's order. A tower that does not answer has no
        gauges until it does; its replacement counts from 0.
        """
        self._heard_at = self._clock()
        self._forget_gauges()
        for stats in towers:
            self._hear(stats, _name_of(stats, processes))
        self._told = {key: stats for key, stats in self._told.items() if key[0] in processes}

    def _forget_gauges(self) -> None:
        for metric, tower in self._gauges:
            self._tally.forget(metric, self._cell, tower)
        self._gauges.clear()

    def _hear(self, stats: EngineStats, tower: str) -> None:
        before = self._told.get((stats.process, stats.tower), EngineStats(stats.tower))
        self._told[stats.process, stats.tower] = stats
        own = _OF_LINKS if stats.tower == "denoiser" else _OF_PREFIXES
        for metric, value in (_COUNTED | own).items():
            self._tally.add(metric, value(stats) - value(before), self._cell, tower)
        if stats.tower == "denoiser":
            for reason, value in _EXPOSED.items():
                self._tally.add(metrics.EXPOSED, value(stats) - value(before), self._cell, tower, reason)
        else:
            self._set(metrics.PREFIX_BYTES, tower, stats.prefix_bytes)
        self._set(metrics.SLOTS, tower, stats.total_slots)
        self._set(metrics.SLOTS_USED, tower, stats.total_slots - stats.free_slots)
        self._set(metrics.PAGES, tower, stats.total_pages)
        self._set(metrics.CACHE_USED, tower, 1 - stats.free_pages / max(1, stats.total_pages))
        if stats.free_memory is not None:
            self._set(metrics.FREE_MEMORY, tower, stats.free_memory)

    def _set(self, metric: Metric, tower: str, value: float) -> None:
        self._tally.set(metric, value, self._cell, tower)
        self._gauges.append((metric, tower))


def _name_of(stats: EngineStats, processes: Sequence[int]) -> str:
    """`context` or `denoiser`; several denoisers are numbered, and a replacement keeps the number."""
    if stats.tower == "context" or len(processes) <= 2 or stats.process not in processes:
        return stats.tower
    return f"{stats.tower} {processes.index(stats.process) - 1}"
