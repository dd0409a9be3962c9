"""A whole cluster under a load, from its first request until the last one has ended."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from benchmarks.simulate_parts.cell import SimCell
from benchmarks.simulate_parts.costs import PassCosts
from benchmarks.simulate_parts.lengths import Asked
from benchmarks.simulate_parts.router import Book, Outcome, RouterCosts, SimRouter
from benchmarks.simulate_parts.serve import Controller, Pace
from cluster.config import ServiceConfig
from cluster.runs.callers import Caller

_SAMPLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Setting:
    """A cluster. `cells`: how many there are at the beginning; `scales`: whether Serve's controller changes that.
    `callers`: addresses that requests come from. `most_tokens`: `max_new_tokens` of each request."""

    config: ServiceConfig
    costs: PassCosts
    cells: int = 1
    routers: int = 1
    router_costs: RouterCosts = field(default_factory=RouterCosts)
    pace: Pace = field(default_factory=Pace)
    denoisers: int = 0
    scales: bool = False
    callers: int = 1000
    most_tokens: int = 1024


@dataclass(frozen=True, slots=True)
class Happening:
    """What comes to pass at `at`."""

    at: float
    what: str
    do: Callable[["Cluster"], None]


@dataclass(slots=True)
class Moment:
    """The cluster at a second. `rows`: of a denoiser's mean pass in it; `router`: the busiest router's share of it."""

    at: float
    cells: int
    starting: int
    leaving: int
    running: int
    waiting: int
    rows: float
    busy: float
    router: float
    most_rows: int


@dataclass(slots=True)
class Result:
    """What came of it. `left`: what is still held after the last request, of what; all 0 where nothing leaks."""

    outcomes: list[Outcome] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    target: int = 0
    cuts: int = 0
    seconds: float = 0.0


class Cluster:
    """Routers, cells, and Serve's controller. `told`: called with each request that has ended."""

    def __init__(self, setting: Setting, seed: int, told: Callable[[Outcome], object] = lambda outcome: None) -> None:
        self.setting, self._told = setting, told
        self._seed, self.book = seed, Book()
        self.random = Random(f"cluster/{seed}")
        random.seed(f"product/{seed}")  # the product draws where a call begins
        self.controller = Controller(
            setting.config, self._cell, setting.pace, Random(f"controller/{seed}"), setting.scales
        )
        self.routers = [self._router(number) for number in range(setting.routers)]
        self.controller.join(self.routers, setting.cells)
        self.result = Result()
        self._callers = [Caller(f"caller{number}") for number in range(setting.callers)]
        self._numbers = 0
        self._busy = self._row_passes = self._passes = 0.0
        self._router_busy = [0.0] * setting.routers

    def _cell(self, name: str) -> SimCell:
        setting = self.setting
        return SimCell(name, setting.config, setting.costs, self.book.of, setting.denoisers)

    def _router(self, number: int) -> SimRouter:
        setting = self.setting
        drawn = Random(f"router/{self._seed}/{number}")
        return SimRouter(number, setting.config, setting.pace, setting.router_costs, self.book, drawn)

    async def open_loop(
        self, rates: Sequence[tuple[float, float]], until: float, draw: Callable[[Random], Asked],
        happenings: Sequence[Happening] = (),
    ) -> Result:  # fmt: skip
        """Poisson arrivals. `rates`: from when on how many a second."""
        loop, drawn = asyncio.get_running_loop(), Random(f"load/{self._seed}")
        for one in happenings:
            loop.call_at(one.at, one.do, self)
        watching = loop.create_task(self._watch())
        async with asyncio.TaskGroup() as requests:
            for due in arrivals(rates, until, Random(f"times/{self._seed}")):
                await asyncio.sleep(due - loop.time())
                router, caller = drawn.choice(self.routers), drawn.choice(self._callers)
                requests.create_task(self._one(router, caller, draw(drawn)))
        return await self._ended(watching)

    async def closed_loop(self, clients: int, asked: Sequence[Asked], overhead_s: float = 0.0) -> Result:
        """Each client sends the next of `asked` when its last one has ended; `overhead_s` passes between two."""
        loop, waiting = asyncio.get_running_loop(), iter(asked)
        watching = loop.create_task(self._watch())

        async def client(number: int) -> None:
            router, caller = self.routers[number % len(self.routers)], self._callers[number % len(self._callers)]
            for one in waiting:
                if overhead_s:
                    await asyncio.sleep(overhead_s)
                await self._one(router, caller, one)

        async with asyncio.TaskGroup() as tasks:
            for number in range(clients):
                tasks.create_task(client(number))
        return await self._ended(watching)

    async def _one(self, router: SimRouter, caller: Caller, asked: Asked) -> None:
        self._numbers += 1
        outcome = await router.ask(f"r{self._numbers}", asked, caller, self.setting.most_tokens)
        self.result.outcomes.append(outcome)
        self._told(outcome)

    async def _ended(self, watching: "asyncio.Task[None]") -> Result:
        self.result.seconds = asyncio.get_running_loop().time()
        await asyncio.sleep(5.0)  # cells hear of the last ends
        watching.cancel()
        for router in self.routers:
            router.watching.cancel()
        cells = [*self.controller.cells.values(), *self.controller.leaving.values()]
        rooms = [room for cell in cells for room in (cell.ledger.context, *cell.ledger.mirrors)]
        self.result.left = {
            "requests in cells": sum(cell.held + cell.ledger.running + cell.ledger.waiting for cell in cells),
            "slots": sum(room.slots - room.free_slots for room in rooms),
            "pages": sum(room.pages - room.free_pages for room in rooms),
            "requests in routers": sum(router.admission.running + router.turns.waiting for router in self.routers),
            "calls": sum(len(router.lines._calls) for router in self.routers),
            "answers": len(self.book.asked),
        }
        self.result.target, self.result.cuts = self.controller.target, self.controller.cuts
        return self.result

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_SAMPLE_S)
            self.result.moments.append(self._moment())

    def _moment(self) -> Moment:
        controller = self.controller
        there = [*controller.cells.values(), *controller.leaving.values()]
        every = [*there, *controller.ended]
        busy = sum(device.busy_s for cell in every for device in cell.devices)
        row_passes, passes = sum(cell.row_passes for cell in every), sum(cell.steps for cell in every)
        routers = [router.processor.busy_s for router in self.routers]
        devices = sum(len(cell.devices) for cell in there)
        moment = Moment(
            asyncio.get_running_loop().time(), len(controller.cells), controller.starting, len(controller.leaving),
            sum(cell.running for cell in there),
            sum(router.turns.waiting for router in self.routers) + sum(cell.ledger.waiting for cell in there),
            (row_passes - self._row_passes) / max(1.0, passes - self._passes),
            (busy - self._busy) / max(1, devices) / _SAMPLE_S,
            max((new - old) / _SAMPLE_S for new, old in zip(routers, self._router_busy, strict=True)),
            max((cell.running for cell in there), default=0),
        )  # fmt: skip
        self._busy, self._row_passes, self._passes, self._router_busy = busy, row_passes, passes, routers
        return moment


def arrivals(rates: Sequence[tuple[float, float]], until: float, drawn: Random) -> Iterator[float]:
    """When requests come: a Poisson process whose rate changes in steps."""
    ends = [*(start for start, _ in rates[1:]), until]
    for (start, rate), end in zip(rates, ends, strict=True):
        at = start
        while rate > 0 and (at := at + drawn.expovariate(rate)) < end:
            yield at
