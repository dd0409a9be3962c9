"""One router's board: each second it keeps numbers that are counted anyway, and returns them when asked.

Knows this router's runs and the cells' beats; `whole.py` puts the boards of all routers together.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from cluster.board.cells_seen import CellsSeen, cell_values
from cluster.board.history import History, Told
from cluster.board.part import Deployed, Part, RouterRow
from cluster.board.runs_seen import RunsSeen
from cluster.board.series import KEPT, Point
from cluster.runs import kept
from cluster.runs.admission import Admission
from cluster.runs.cell_lines import CellLines
from cluster.runs.turns import Turns

logger = logging.getLogger(__name__)

TICK_S = 1.0
_MOST_HISTORIES = 16
_LATE_S = 0.02  # delay after each full second, so that an early timer does not count a second twice
_LEAST_S = 0.5  # least part of a late second: a rate over less says little


class Board:
    """`observer` is for the runs. Call `hold`, then `start` in the runs' event loop.

    `clock`: seconds since the epoch."""

    def __init__(self, name: str, node: str, deployed: Deployed, clock: Callable[[], float] = time.time) -> None:
        self.name, self._node, self._deployed, self._clock = name, node, deployed, clock
        self._began = self._ticked = clock()
        self.history = History()
        self.past: dict[str, History] = {}  # of other routers, the most recently heard last
        self.observer = RunsSeen(self._note)
        self._cells = CellsSeen(deployed.modes, lambda: kept.cells, self._note)
        self._ticking: asyncio.Task[None] | None = None
        self._note("deploy", f"deployed: {deployed.model}, version {deployed.version}, settings {deployed.settings}")

    def hold(
        self,
        admission: Admission,
        turns: Turns,
        lines: CellLines,
        ready: Callable[[], object],
        faults: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """Set the sources of this router's state."""
        self._faults = faults
        self._admission, self._turns, self._lines, self._ready = admission, turns, lines, ready

    def start(self) -> None:
        """Keep each second from now on."""
        self._ticking = asyncio.create_task(self._tick_for_ever())

    def stop(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._clock()

    def part(self, since: Mapping[str, int]) -> Part:
        """This router's Part for a reader that knows the histories up to `since`, by router."""
        now = self._clock()
        own, past = self.history, self.past.items()
        histories = {name: one.told(since.get(name, 0)) for name, one in past if one.last > since.get(name, 0)}
        histories[self.name] = own.told(since.get(self.name, 0))
        runs = self.observer.rows()
        return Part(
            at=now,
            router=self._row(now),
            runs=runs,
            more=self.observer.running - len(runs),
            cells=self._cells.rows(now),
            gone=self._cells.gone(now),
            histories=histories,
        )

    def hear(self, histories: Mapping[str, Told]) -> None:
        """Take what other routers know of themselves and of earlier routers. The newer report counts."""
        for name, told in histories.items():
            if name == self.name:
                continue
            history = self.past.pop(name, None) or History()
            if not told.fine or told.fine[-1].t >= history.last:
                history.hear(told)
            self.past[name] = history
        while len(self.past) > _MOST_HISTORIES:
            del self.past[next(iter(self.past))]

    def known(self) -> dict[str, int]:
        """The time up to which each router's history is known here."""
        return {self.name: self.history.last, **{name: history.last for name, history in self.past.items()}}

    def tick(self) -> None:
        """Keep the second that has passed."""
        now = self._clock()
        passed_s, self._ticked = max(_LEAST_S, now - self._ticked), now
        beats = self._lines.beats()
        self._cells.hear(beats, now)
        counts, firsts = self.observer.take()
        values = {name: amount / passed_s for name, amount in counts.items()} | cell_values(beats)
        values["queued"] = sum(beat.waiting for beat in beats)
        values["waiting"] = self._turns.waiting
        values["longest_wait"] = self._turns.longest_wait_s()
        self.history.add(Point(int(now) - 1, tuple(values.get(series.name, 0.0) for series in KEPT), firsts))

    def _row(self, now: float) -> RouterRow:
        turns, admission = self._turns, self._admission
        return RouterRow(
            name=self.name,
            node=self._node,
            deployed=self._deployed,
            up_s=round(now - self._began, 1),
            ready=bool(self._ready()),
            drains=admission.closed,
            open=admission.running,
            capacity=admission.capacity,
            waiting=turns.waiting,
            longest_wait_s=round(turns.longest_wait_s(), 1),
            faults=self._faults(),
        )

    def _note(self, kind: str, text: str) -> None:
        self.history.note(self._clock(), kind, text)

    async def _tick_for_ever(self) -> None:
        """At each full second, as all routers do: their points lie on one axis."""
        while True:
            await asyncio.sleep(TICK_S + _LATE_S - self._clock() % TICK_S)
            try:
                self.tick()
            except Exception:
                logger.exception("a second of the board is lost")
