"""A router and a cell whose watching can be switched while they run: a service has no such setting, nor needs one."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

from benchmarks.watching_parts.figures import Way
from benchmarks.watching_parts.observers import chosen
from cluster import app
from cluster.app import CellReplica, RouterReplica
from cluster.runs.observers import Observer


class SwitchedRouter(RouterReplica):
    """All that is asked from then on is watched this way. Ask for it while nothing runs."""

    _every: tuple[Observer, ...] | None = None

    async def watched(self, way: str) -> list[str]:
        """The observers that there are now, by name."""
        means = self._generation._means
        self._every = self._every or means.observers
        self._generation._means = replace(means, observers=chosen(self._every, Way(way)))
        if not is_over(self._watch._flushing):
            self._watch._flushing.cancel()  # type: ignore[union-attr]
        self._board.stop()
        if way != Way.OFF:
            self._watch.start(self._admission, self._turns, self._lines, self._readiness)
            self._board.start()
        return [type(one).__name__ for one in self._generation._means.observers]


class SwitchedCell(CellReplica):
    """Only what it tells Ray: what its towers say goes to Serve's autoscaling and to the routers all the same."""

    async def watched(self, way: str) -> None:
        self._watch.stop()
        if way != Way.OFF:
            self._watch.start(self._moment)


def is_over(task: "asyncio.Task[None] | None") -> bool:
    return task is None or task.done()


@contextmanager
def switchable() -> Iterator[None]:
    """A service that is deployed meanwhile can be switched."""
    with patch.object(app, "RouterReplica", SwitchedRouter), patch.object(app, "CellReplica", SwitchedCell):
        yield
