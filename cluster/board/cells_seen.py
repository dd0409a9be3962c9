"""The cells as one router hears them: each one's state, since when, and its end."""

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

from cluster.runs.messages import Beat
from cluster.runs.signs import TowerSign
from twotower.core import Mode

_GONE_SHOWN_S = 120.0
_MOST_GONE = 16


@dataclass(frozen=True, slots=True)
class CellRow:
    """A cell now. `lacks`: modes of the checkpoint that it has not served for `lacking_s` seconds. `leaves`: Serve is
    removing it, and it only finishes its requests. `known_s`: since this router first heard from it.
    """

    name: str
    node: str
    placement: str
    fingerprint: str
    modes: tuple[Mode, ...]
    lacks: tuple[Mode, ...]
    lacking_s: float
    leaves: bool
    known_s: float
    running: int
    waiting: int
    slots: int
    mending_s: float
    mended: int
    towers: tuple[TowerSign, ...] = ()


@dataclass(frozen=True, slots=True)
class GoneRow:
    """A cell that has ended. `lost`: Serve had not removed it."""

    name: str
    ago_s: float
    lost: bool


@dataclass(slots=True)
class _Known:
    """A known cell: since when, since when it lacks modes, and which of its events have been noted."""

    since: float
    lacking_since: float | None = None
    leaves: bool = False
    mends: bool = False


class CellsSeen:
    """Call `hear` each second with the living cells' beats. `kept`: which cells Serve keeps; none if Serve has not
    said.

    `note` is called with the events of cells, by kind and text."""

    def __init__(
        self,
        modes: Sequence[Mode],
        kept: Callable[[], Set[str]] = frozenset,
        note: Callable[[str, str], None] = lambda kind, text: None,
    ) -> None:
        self._modes, self._kept, self._note = tuple(modes), kept, note
        self._known: dict[str, _Known] = {}
        self._beats: dict[str, Beat] = {}
        self._gone: dict[str, tuple[float, bool]] = {}
        self._fingerprints: set[str] = set()

    def hear(self, beats: Iterable[Beat], now: float) -> None:
        self._beats = {beat.cell: beat for beat in beats}
        for name in self._known.keys() - self._beats.keys():
            self._forget(name, now)
        kept = self._kept()
        for name, beat in self._beats.items():
            known = self._known.get(name)
            if known is None:
                known = self._known[name] = _Known(now)
                self._gone.pop(name, None)
                self._note("cell", f"cell {name} has come")
            known.leaves = bool(kept) and name not in kept
            lacks = self._lacks(beat)
            known.lacking_since = (known.lacking_since or now) if lacks else None
            self._note_mending(name, beat, known)

    def rows(self, now: float) -> tuple[CellRow, ...]:
        return tuple(self._row(beat, now) for _, beat in sorted(self._beats.items()))

    def gone(self, now: float) -> tuple[GoneRow, ...]:
        """Cells that ended lately, and the last one of all."""
        last = max((at for at, _ in self._gone.values()), default=now)
        since = min(last, now - _GONE_SHOWN_S)
        self._gone = {name: told for name, told in self._gone.items() if told[0] >= since}
        return tuple(GoneRow(name, round(now - at, 1), lost) for name, (at, lost) in self._gone.items())

    def _forget(self, name: str, now: float) -> None:
        known = self._known.pop(name)
        self._note("cell" if known.leaves else "lost", f"cell {name} {'has left' if known.leaves else 'is lost'}")
        self._gone[name] = now, not known.leaves
        while len(self._gone) > _MOST_GONE:
            del self._gone[next(iter(self._gone))]

    def _lacks(self, beat: Beat) -> tuple[Mode, ...]:
        return tuple(mode for mode in self._modes if mode not in beat.modes)

    def _note_mending(self, name: str, beat: Beat, known: _Known) -> None:
        mends = beat.sign is not None and beat.sign.mending_s > 0
        if mends and not known.mends:
            self._note("mend", f"cell {name} has lost a tower and mends itself")
        elif known.mends and not mends:
            self._note("mend", f"cell {name} is whole again")
        known.mends = mends

    def _row(self, beat: Beat, now: float) -> CellRow:
        known, sign = self._known[beat.cell], beat.sign
        lacking_s = 0.0 if known.lacking_since is None else now - known.lacking_since
        return CellRow(
            name=beat.cell,
            node=sign.node if sign is not None else "",
            placement=sign.placement if sign is not None else "",
            fingerprint=beat.fingerprint,
            modes=beat.serves,
            lacks=self._lacks(beat),
            lacking_s=round(lacking_s, 1),
            leaves=known.leaves,
            known_s=round(now - known.since, 1),
            running=beat.running,
            waiting=beat.waiting,
            slots=beat.slots,
            mending_s=round(sign.mending_s, 1) if sign is not None else 0.0,
            mended=sign.mended if sign is not None else 0,
            towers=sign.towers if sign is not None else (),
        )


def cell_values(beats: Iterable[Beat]) -> dict[str, float]:
    """The sums over all cells for a moment, by the series' name."""
    told = [*beats]
    towers = [tower for beat in told if beat.sign is not None for tower in beat.sign.towers if tower.answers]
    denoisers = [tower for tower in towers if tower.name.startswith("denoiser")]
    contexts = [tower for tower in towers if tower.name == "context"]
    return {
        "cells": len(told),
        "running": sum(beat.running for beat in told),
        "exchange": sum(tower.exchange_rate for tower in denoisers),
        "exposed": _mean([min(1.0, tower.commit_wait + tower.prompt_wait) for tower in denoisers]),
        "busy_context": _mean([tower.busy for tower in contexts]),
        "busy_denoiser": _mean([tower.busy for tower in denoisers]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
