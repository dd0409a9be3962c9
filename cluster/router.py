"""One router of the service: both faces in one process, without weights and without a GPU."""

import asyncio
import gc
import hashlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from actors.process_logs import log_to_stderr
from cluster.board.board import Board
from cluster.board.face import add_ops
from cluster.board.feed import Feed
from cluster.board.part import CODEC, Deployed
from cluster.board.siblings import Ask, nobody
from cluster.board.trade import Trade, add_trade
from cluster.certificates import Files, rereading
from cluster.config import ServiceConfig
from cluster.faces.grpc.service import GrpcServer
from cluster.faces.http.service import make_app
from cluster.message_size import check_message_size
from cluster.no_proxies import bypass_proxies
from cluster.readiness import Readiness
from cluster.runs.admission import Admission
from cluster.runs.callers import Door, OpenDoor
from cluster.runs.cell_lines import CellLines
from cluster.runs.generation import Generation
from cluster.runs.keys import Keys
from cluster.runs.remote_cells import RemoteCells
from cluster.runs.run import Patience
from cluster.runs.served_model import ServedModel, load_served_model
from cluster.runs.turns import Turns
from cluster.served_paths import checkpoint_directory
from cluster.watch.files import Files as FilesSeen
from cluster.watch.router import RouterWatch
from cluster.watch.shown import ShownOverHttp
from twotower.errors import Unavailable

logger = logging.getLogger(__name__)


_LEFT_S = 5.0  # Serve asks for a kept router's health each second; after so long without, it is removing this one
_AHEAD = 4  # one further request waits on a cell for so many of its slots
LAST_WORDS_S = 2.0  # ended requests get their error within this time


def prompts_at_once(config: ServiceConfig) -> int:
    """How many prompts of one call the cells hold at a time: half of the sequences that one cell decodes at once."""
    return max(1, config.engine.max_sequences // 2)


def admission(config: ServiceConfig, clock: Callable[[], float] = time.monotonic) -> Admission:
    """The bound of this router's requests: all that the cells decode at once, plus its part of the queue. A cell's own
    ledger decides in the end.
    """
    engine, cluster = config.engine, config.cluster
    waiting = math.ceil(engine.max_queued_requests / cluster.routers)
    capacity = cluster.max_cells * (engine.max_sequences + waiting)
    return Admission(capacity, cluster.min_cells * engine.max_sequences, clock)


def turns(config: ServiceConfig, lines: CellLines, clock: Callable[[], float] = time.monotonic) -> Turns:
    """The cells get as many requests as they decode at once, and a few more, so that no slot stays empty. The others
    wait here, where their order can still change and a new cell can take them.

    A router has its equal part of these places always, and more while the cells hold less than all routers may send.
    """
    engine, routers = config.engine, config.cluster.routers
    ahead, fewest = min(math.ceil(engine.max_sequences / _AHEAD), engine.max_queued_requests), config.cluster.min_cells

    def most() -> int:
        cells = lines.sums
        places = cells.slots + ahead * cells.cells
        return min(places, max(math.ceil(places / routers), cells.own + places - cells.held))

    return Turns(most, fewest * engine.max_sequences, clock)


def door(config: ServiceConfig) -> Door:
    """The check of callers. Raises ConfigError for a wrong file of keys."""
    file = config.ingress.keys_file
    return OpenDoor() if file is None else Keys(Path(file), config.cluster.routers)


def deployed(config: ServiceConfig, model: ServedModel) -> Deployed:
    """The deployment for the ops page. Other ports make another deployment, too."""
    settings = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:8]
    cluster, modes = config.cluster, model.limits.modes
    return Deployed(
        model.name, model.fingerprint, model.version, settings, modes,
        cluster.min_cells, cluster.max_cells, cluster.routers,
    )  # fmt: skip


class Router:
    """Serve awaits the constructor, then asks for the ASGI app; the gRPC server listens beside it."""

    async def __init__(  # type: ignore[misc]
        self, config: ServiceConfig, cells: "DeploymentHandle[Any]", name: str = "router", routers: Ask = nobody
    ) -> None:
        """`name`: unique among routers. `routers`: asks all routers for their boards."""
        log_to_stderr()
        bypass_proxies()  # before the handle connects to a cell
        self._ingress = ingress = config.ingress
        self._drain_timeout_s = config.cluster.drain_timeout_s
        self._kept_at = time.monotonic()
        check_message_size(config)
        model = await asyncio.to_thread(load_served_model, config)
        self._lines = CellLines()
        node = get_node_ip_address()
        await self._lines.start(node)
        self._cells = RemoteCells(cells, self._lines)
        self._admission = admission(config)
        at_once = prompts_at_once(config)
        patience = Patience(config.cluster.max_resumes, config.cluster.queue_timeout_s)
        self._turns = turns(config, self._lines)
        self._lines.on_beat, self._lines.waits = self._turns.grant, self._turns.waits
        who_may_ask = await asyncio.to_thread(door, config)
        self._watch = RouterWatch(model.name, model.limits.modes, keys=who_may_ask.names)
        self._board = Board(name, node, deployed(config, model))
        self._feed = Feed(self._board, routers, self._is_left)
        self._trade = Trade(checkpoint_directory(config.model.checkpoint), model)
        self._generation = Generation(
            model, self._cells, ingress.request_timeout_s, at_once, self._admission, patience, self._turns,
            (*self._watch.observers, *([self._board.observer] if ingress.ops_page else [])), who_may_ask,
        )  # fmt: skip
        files = Files.of(ingress)
        certificates = None if files is None else await asyncio.to_thread(rereading, files)
        self._grpc = GrpcServer(
            self._generation, ingress.host, ingress.grpc_port, ingress.max_request_bytes,
            certificates=certificates, max_age_s=ingress.grpc_max_connection_age_s,
        )  # fmt: skip
        await self._grpc.start()
        self._readiness = Readiness(self._cells, self._grpc.set_served)
        shown = ShownOverHttp(ingress.host, ingress.http_port)
        watches = [self._readiness.watch(), who_may_ask.watch()]
        watches += [certificates.watch(), shown.watch()] if certificates else []
        self._watching = [asyncio.create_task(one) for one in watches]
        files_seen = FilesSeen(who_may_ask, certificates, shown)
        self._watch.start(self._admission, self._turns, self._lines, self._readiness, files_seen)
        self._board.hold(self._admission, self._turns, self._lines, self._readiness, files_seen.told)
        if ingress.ops_page:
            self._board.start()
            self._adopting = asyncio.create_task(self._feed.adopt())
        # All present objects stay: searching them for garbage would block the loop for a tenth of a second and more.
        gc.freeze()
        until = "" if certificates is None else f", TLS until {certificates.now.until:%Y-%m-%d %H:%M} UTC"
        logger.info("serving %s, gRPC on %s:%d%s", model.name, ingress.host, ingress.grpc_port, until)

    def __serve_build_asgi_app__(self) -> FastAPI:
        ingress = self._ingress
        app = make_app(
            self._generation,
            self._readiness,
            ingress.max_request_bytes,
            ingress.body_timeout_s,
            ingress.cors_origins,
        )
        if ingress.ops_page:
            add_ops(app, self._feed, keys=ingress.keys_file is not None)
            add_trade(app, self._trade)
        return app

    async def board_part(self, since: dict[str, int]) -> bytes:
        """This router's part for other routers' pages; see cluster.board."""
        return CODEC.encode(self._board.part(since))

    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests with Unavailable. Running ones may take so long, then they end with an error."""
        self._admission.close()
        await self._readiness.close()
        await self._finish(timeout_s)
        self._feed.stop()

    async def _finish(self, timeout_s: float) -> None:
        if not await self._admission.nothing_runs(timeout_s):
            self._generation.give_up(Unavailable("the service has shut down before this request was finished"))
            await self._admission.nothing_runs(LAST_WORDS_S)

    def _is_left(self) -> bool:
        """Whether Serve has stopped asking."""
        return time.monotonic() - self._kept_at > _LEFT_S

    async def check_health(self) -> None:
        """Serve asks each second, until it begins to remove this router."""
        self._kept_at = time.monotonic()

    async def shutdown(self) -> None:
        """Serve removes this router once its HTTP requests are done. Its gRPC calls then have the rest of the time to
        drain. New calls go to the router that replaces it, if any.
        """
        left_s = max(0.0, self._kept_at + self._drain_timeout_s - time.monotonic())
        ending = asyncio.create_task(self._grpc.stop(left_s + LAST_WORDS_S))
        await self._finish(left_s)
        await ending
        for watching in self._watching:  # not before: running requests may need a connection to a new cell
            watching.cancel()
        self._feed.stop()
        self._board.stop()
        self._lines.stop()
        await self._watch.stop()
