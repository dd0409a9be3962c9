"""A cell's processes are ended before anything waits for them."""

import asyncio
from typing import Any, cast

from actors.cell import RunningPair


class Hung:
    """A process that reads nothing: its line is closed once it is dead, and not before."""

    def __init__(self) -> None:
        self._dead = asyncio.Event()
        self.closed = False

    def kill(self) -> None:
        self._dead.set()

    async def close_line(self) -> None:
        await self._dead.wait()
        self.closed = True


class NoPair:
    async def close(self) -> None:
        pass


async def test_a_hung_process_does_not_outlive_its_cell() -> None:
    engines = [Hung(), Hung()]
    pair = RunningPair(cast(Any, NoPair()), cast(Any, engines))
    async with asyncio.timeout(5):
        await pair.close()
    assert all(engine.closed for engine in engines)
