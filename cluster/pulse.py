"""How a cell and a router notice that the other end of their connection hangs: each speaks every second."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

BEAT_S = 1.0
CELL_MISSES = 3  # beats of a cell, after which a router goes on elsewhere
ROUTER_MISSES = 5  # beats of a router, after which a cell gives its sequences up: the lease


@dataclass(frozen=True, slots=True)
class Beat:
    """A cell lives: which one, whether it serves, and how full it is."""

    cell: str
    serves: bool
    running: int
    waiting: int
    slots: int


class Pulse:
    """One end: calls `say` every second, and `hang_up` once the other end has not been `heard` for `misses` of them.

    It is our own beats that are counted: who was held up himself does not take the other end for dead.
    """

    def __init__(self, say: Callable[[], None], hang_up: Callable[[], None], misses: int) -> None:
        self._say, self._hang_up, self._misses = say, hang_up, misses
        self._unheard = 0

    def heard(self) -> None:
        self._unheard = 0

    async def beat(self) -> None:
        """Until the other end is silent for too long."""
        while self._unheard < self._misses:
            self._say()
            await asyncio.sleep(BEAT_S)
            self._unheard += 1
        self._hang_up()
