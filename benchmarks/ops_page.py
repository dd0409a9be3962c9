"""What the ops page costs a router, and how it looks, with as many cells, requests and watchers as one likes.

    python -m benchmarks.ops_page --cells 100 --requests 200 --watchers 8
    python -m benchmarks.ops_page --serve 8010            # look at http://127.0.0.1:8010/ops

Cells, requests and the other router are made up; the board, what crosses between routers, the snapshots and the streams
are the service's own. One that serves also loses a denoiser now and then, so that the page has something to say.
"""

import argparse
import asyncio
import math
import random
import statistics
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI

from cluster.board.board import Board
from cluster.board.face import add_ops
from cluster.board.feed import NEWS_S, Feed
from cluster.board.history import COARSE_POINTS, COARSE_S, FINE_POINTS
from cluster.board.part import CODEC, Deployed
from cluster.board.trade import Trade, add_trade
from cluster.config import ServiceConfig
from cluster.runs.admission import Admission
from cluster.runs.answer import Usage
from cluster.runs.messages import Beat
from cluster.runs.record import Record
from cluster.runs.served_model import load_served_model
from cluster.runs.signs import CellSign, TowerSign
from cluster.runs.turns import Turns
from cluster.served_paths import checkpoint_directory
from twotower.core import BlockEvent, DecodingParams, Mode, Request, RequestId
from twotower.errors import Unavailable

_SLOTS = 32
_MEMORY = (
    "32 sequences and 131072 tokens fit; 61.3 GiB: weights 58.8 GiB, slots 1.5 GiB, pages 0.8 GiB, staging 0.2 GiB"
)
_DIFFUSED = (Mode.DIFFUSION,) * 8 + (Mode.MOCK_AR, Mode.AR)


@dataclass
class Made:
    """A service that is made up: cells by their beats, requests by what their observers hear. `now`: its clock."""

    cells: int
    requests: int
    now: float
    eventful: bool = False
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    lacking: dict[int, float] = field(default_factory=dict)  # cells without a denoiser, since when
    slots: int = _SLOTS

    def load(self) -> float:
        """Between a quarter and all, with the minutes."""
        wave = 0.62 + 0.25 * math.sin(self.now / 190) + 0.12 * math.sin(self.now / 37)
        return min(1.0, max(0.05, wave + self.chance.gauss(0, 0.03)))

    def beats(self) -> list[Beat]:
        """As CellLines has them."""
        load = self.load()
        return [self._beat(number, load) for number in range(self.cells)]

    def _beat(self, number: int, load: float) -> Beat:
        since = self.lacking.get(number)
        modes = tuple(Mode) if since is None else (Mode.AR,)
        mending_s = 0.0 if since is None else self.now - since
        sign = CellSign(
            f"10.0.{number // 8}.{number % 8 + 10}", "split", mending_s, number % 3, self._towers(load, since)
        )
        name = f"{((number + 1) * 2654435761) % 2**32:08x}"
        running = 0 if since is not None else max(0, min(_SLOTS, round(_SLOTS * load + self.chance.gauss(0, 2))))
        return Beat(name, "f3d1c0de", modes, running, 2 if load > 0.95 else 0, _SLOTS, sign)

    def _towers(self, load: float, lost: float | None) -> tuple[TowerSign, ...]:
        share = lambda mean: min(1.0, max(0.0, mean + self.chance.gauss(0, 0.03)))  # noqa: E731  # a jitter
        used = round(4096 * load * 0.8)
        whole = TowerSign(
            "context", 4711, "cuda:0", True, share(0.30 * load), 0.0, 0.0, round(_SLOTS * load), _SLOTS,
            _SLOTS - round(_SLOTS * load), 8192, 8192 - used, 0.0, 14_300_000_000, _MEMORY,
        )  # fmt: skip
        denoiser = replace(
            whole, name="denoiser", process=4712, device="cuda:1", busy=share(0.86 * load),
            commit_wait=share(0.06 * load), prompt_wait=share(0.02), exchange_rate=2.1e9 * load,
        )  # fmt: skip
        return (whole, denoiser if lost is None else TowerSign("denoiser", 4712, "cuda:1", answers=False))


class Asked:
    """Requests of one router: they begin, get blocks and end, and the router's observer hears of it."""

    def __init__(self, made: Made, board: Board) -> None:
        self._made, self._board, self._numbers = made, board, 0
        self._records: list[Record] = []

    def second(self) -> None:
        """What happens to them in one."""
        chance, seen = self._made.chance, self._board.observer
        wanted = round(self._made.requests * self._made.load())
        while len(self._records) < wanted:
            self._begin()
        for record in [*self._records]:
            for _ in range(chance.choice((0, 1, 2))):
                if record in self._records:
                    self._block(record)
        if self._made.eventful and chance.random() < 0.004 and self._records:
            record = self._records.pop(0)
            seen.resumed(record, Unavailable("gone"))
            seen.ended(record, Unavailable("no cell"))

    def _begin(self) -> None:
        self._numbers += 1
        chance, mode = self._made.chance, self._made.chance.choice(_DIFFUSED)
        params = DecodingParams(mode=mode, max_new_tokens=chance.choice((64, 128, 256, 512, 2048)))
        request = Request(RequestId(f"req-{chance.getrandbits(128):032x}"), (5,) * 40, params)
        record = Record(request, "f3d1c0de", usage=Usage(40))
        self._board.observer.opened(record)
        record.attempts.append(chance.choice(self._made.beats()[:3]).cell)
        self._board.observer.placed(record)
        self._records.append(record)

    def _block(self, record: Record) -> None:
        chance, seen, request = self._made.chance, self._board.observer, record.request
        assert isinstance(request, Request)
        width = 16 if request.params.mode is Mode.DIFFUSION else 1
        steps = chance.choice((2, 3, 3, 4, 4, 5, 6, 9)) if width > 1 else 1
        event = BlockEvent(request.id, record.usage.completion_tokens, (5,) * width, steps, 1)
        if not record.usage.num_blocks:
            seen.first_event(record, event)
        seen.event(record, event)
        record.usage = record.usage.plus(event)
        if record.usage.completion_tokens >= request.params.max_new_tokens:
            self._records.remove(record)
            seen.ended(record, None)


class MadeRouter:
    """A router's board over a service that is made up."""

    def __init__(self, name: str, made: Made, routers: int) -> None:
        deployed = Deployed("nemotron-twotower-30b", "f3d1c0de", "0.2.0", "9a41e07c", tuple(Mode), 2, 8, routers)
        self.made = made
        self.board = Board(name, "10.0.0.2" if name.startswith("a") else "10.0.0.3", deployed, lambda: made.now)
        self.asked = Asked(made, self.board)
        lines: Any = made
        self.board.hold(Admission(made.cells * 2 * _SLOTS, _SLOTS), Turns(lambda: 1 << 20), lines, lambda: True)

    def second(self) -> None:
        self.asked.second()
        self.board.tick()


class MadeService:
    """Two routers over the same cells, with three hours behind them. The first is the one that is asked."""

    def __init__(self, cells: int, requests: int, eventful: bool = False) -> None:
        self.made = Made(cells, requests, time.time(), eventful)
        until, hours = self.made.now, COARSE_POINTS * COARSE_S
        self.made.now = until - hours
        self.routers = [MadeRouter(name, self.made, 2) for name in ("a7f3c2d9e1", "c05b9e44f2")]
        self.feed = Feed(self.routers[0].board, self._ask)
        while self.made.now < until:
            is_far = until - self.made.now > FINE_POINTS + COARSE_S
            self.second(COARSE_S if is_far else 1)
        self.made.now = until

    def second(self, passes_s: float = 1.0) -> None:
        self.made.now += passes_s
        if self.made.eventful:
            self._happen()
        for router in self.routers:
            router.second()

    def _happen(self) -> None:
        made = self.made
        for number, since in [*made.lacking.items()]:
            if made.now - since > 25:
                del made.lacking[number]
        if not made.lacking and made.chance.random() < 0.006:
            made.lacking[made.chance.randrange(made.cells)] = made.now

    async def _ask(self, since: Mapping[str, int]) -> list[bytes]:
        return [CODEC.encode(router.board.part(since)) for router in self.routers[1:]]

    def app(self) -> FastAPI:
        app = FastAPI()
        add_ops(app, self.feed)
        add_trade(app, Trade(checkpoint_directory("demo"), load_served_model(ServiceConfig())))
        return app

    async def live(self) -> None:
        while True:
            await asyncio.sleep(1.0 - time.time() % 1.0 + 0.01)
            self.second(time.time() - self.made.now)


async def timed_ms(work: Callable[[], object], times: int) -> float:
    """The median of the CPU time that one takes."""
    took = []
    for _ in range(times):
        began = time.process_time()
        made = work()
        if isinstance(made, Coroutine):
            await made
        took.append(1000 * (time.process_time() - began))
    return statistics.median(took)


async def measure(service: MadeService, watchers: int, seconds: float) -> dict[str, float]:
    """Costs in CPU milliseconds of a router's process, and sizes in kB."""
    feed, board = service.feed, service.routers[0].board
    parts, since = await feed.parts(), int(service.made.now) - NEWS_S

    async def news() -> bytes:
        return (await feed.put_together(parts, since)).encoded()

    async def whole() -> bytes:
        return (await feed.put_together(parts, 0)).encoded()

    return {
        "keeping a second (always), ms": await timed_ms(board.tick, 30),
        "a part for another router, ms": await timed_ms(lambda: CODEC.encode(board.part(board.known())), 30),
        "a snapshot for the stream, ms": await timed_ms(news, 30),
        "a snapshot of all hours, ms": await timed_ms(whole, 5),
        "a snapshot for the stream, kB": len(await news()) / 1000,
        "a snapshot of all hours, kB": len(await whole()) / 1000,
        f"a second with {watchers} watchers, ms": await _watched_ms(service, watchers, seconds),
    }


async def _watched_ms(service: MadeService, watchers: int, seconds: float) -> float:
    async def watch() -> None:
        async for _ in service.feed.watch():
            pass

    watching = [asyncio.create_task(watch()) for _ in range(watchers)]
    await asyncio.sleep(1.5)
    began, cpu = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    cost = 1000 * (time.process_time() - cpu) / (time.monotonic() - began)
    for task in watching:
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
    return cost


async def serve(service: MadeService, port: int) -> None:
    import uvicorn

    living = asyncio.create_task(service.live())
    await uvicorn.Server(uvicorn.Config(service.app(), port=port, log_level="warning")).serve()
    living.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--requests", type=int, default=14, help="under way in each of two routers, at most")
    parser.add_argument("--watchers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="for which they watch")
    parser.add_argument("--serve", type=int, metavar="PORT", help="show the page instead of measuring")
    options = parser.parse_args()
    service = MadeService(options.cells, options.requests, eventful=options.serve is not None)
    if options.serve is not None:
        asyncio.run(serve(service, options.serve))
        return
    for what, value in asyncio.run(measure(service, options.watchers, options.seconds)).items():
        print(f"{what:<40} {value:8.2f}")


if __name__ == "__main__":
    main()
