"""The state of a cell's towers for its beat, from their counters: shares of the time between two answers."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.runs.signs import TowerSign
from twotower.engine.handle import EngineStats

SILENCE_S = 5.0  # after this time a tower counts as not answering
_LEAST_S = 0.2  # seconds between answers; shares of less time say little


@dataclass(slots=True)
class _Heard:
    """The last answer of one tower, and the sign made from it."""

    at: float
    stats: EngineStats
    sign: TowerSign


class TowerSigns:
    """Call `hears` with the towers' answers whenever they were asked. `expected`: the towers of the cell's processes, a
    tuple of names each.
    """

    def __init__(self, expected: Sequence[tuple[str, ...]], clock: Callable[[], float] = time.monotonic) -> None:
        self._expected, self._clock = expected, clock
        self._heard: dict[str, _Heard] = {}

    def hears(self, towers: Sequence[EngineStats], homes: Sequence[Mapping[str, str]]) -> None:
        """`homes`: the homes of the cell's tower processes, in the cell's order; an empty one is being replaced."""
        now, places = self._clock(), {int(home["pid"]): place for place, home in enumerate(homes) if home}
        for stats in towers:
            place = places.get(stats.process)
            if place is None or place >= len(self._expected):
                continue
            name = next((name for name in self._expected[place] if name.startswith(stats.tower)), stats.tower)
            before = self._heard.get(name)
            if before is not None and before.stats.process == stats.process and now - before.at < _LEAST_S:
                continue
            self._heard[name] = _Heard(now, stats, _sign(name, stats, homes[place], before, now))

    def now(self, homes: Sequence[Mapping[str, str]]) -> tuple[TowerSign, ...]:
        """The signs of all towers that the cell should have."""
        since = self._clock() - SILENCE_S
        signs = []
        for place, names in enumerate(self._expected):
            home = homes[place] if place < len(homes) else {}
            for name in names:
                heard = self._heard.get(name)
                lives = heard is not None and heard.at >= since and str(heard.stats.process) == home.get("pid")
                signs.append(heard.sign if heard is not None and lives else _silent(name, home))
        return tuple(signs)


def towers_of(placement: str, denoisers: int) -> list[tuple[str, ...]]:
    """The names of the towers that each process of a cell hosts."""
    if placement == "ar_only":
        return [("context",)]
    if placement == "colocated":
        return [("context", "denoiser")]
    return [("context",), *((f"denoiser {number}" if denoisers > 1 else "denoiser",) for number in range(denoisers))]


def _silent(name: str, home: Mapping[str, str]) -> TowerSign:
    return TowerSign(name, int(home.get("pid", 0)), home.get("device", ""), answers=False)


def _sign(name: str, stats: EngineStats, home: Mapping[str, str], before: _Heard | None, now: float) -> TowerSign:
    """The first answer of a process has no time before it: all shares are 0."""
    same = before is not None and before.stats.process == stats.process
    old, passed_s = (before.stats, now - before.at) if before is not None and same else (stats, 1.0)

    def share(seconds: Callable[[EngineStats], float]) -> float:
        return min(1.0, max(0.0, (seconds(stats) - seconds(old)) / passed_s))

    return TowerSign(
        name,
        stats.process,
        home.get("device", ""),
        answers=True,
        busy=share(lambda one: one.busy_s),
        commit_wait=share(lambda one: one.held_up_s),
        prompt_wait=share(lambda one: one.prompt_wait_s),
        sequences=stats.sequences,
        slots=stats.total_slots,
        free_slots=stats.free_slots,
        pages=stats.total_pages,
        free_pages=stats.free_pages,
        exchange_rate=max(0.0, (stats.exchange_bytes - old.exchange_bytes) / passed_s),
        free_memory=stats.free_memory,
        memory=home.get("memory", ""),
    )
