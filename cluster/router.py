"""One router of the service: both faces in one process, without weights and without a GPU."""

import asyncio
import logging
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from actors.process_logs import log_to_stderr
from cluster.admission import Admission
from cluster.config import ServiceConfig
from cluster.event_lines import EventServer
from cluster.generation import Generation
from cluster.grpc_service import GrpcServer
from cluster.http import make_app
from cluster.local_ray import bypass_proxies
from cluster.message_size import check_message_size
from cluster.readiness import Readiness
from cluster.remote_cells import RemoteCells
from cluster.runs.run import Patience
from cluster.served_model import load_served_model
from twotower.errors import Unavailable

logger = logging.getLogger(__name__)


_LAST_WORDS_S = 2.0  # what is given up is told so in less


def prompts_at_once(config: ServiceConfig) -> int:
    """How many prompts of one call the cells hold at a time: half of what one cell decodes at once."""
    return max(1, config.cell.max_sequences // 2)


def admission(config: ServiceConfig) -> Admission:
    """What all cells decode at once and keep waiting. A cell's own ledger has the last word."""
    cell, cluster = config.cell, config.cluster
    capacity = cluster.max_cells * (cell.max_sequences + cluster.max_queued_requests)
    return Admission(capacity, cluster.min_cells * cell.max_sequences)


class Router:
    """Serve awaits the constructor, then asks for the ASGI app; the gRPC server listens beside it."""

    async def __init__(self, config: ServiceConfig, cells: "DeploymentHandle[Any]") -> None:  # type: ignore[misc]
        log_to_stderr()
        bypass_proxies()  # before the handle connects to a cell
        self._ingress = ingress = config.ingress
        self._drain_timeout_s = config.cluster.drain_timeout_s
        check_message_size(config)
        model = await asyncio.to_thread(load_served_model, config)
        self._events = EventServer()
        await self._events.start(get_node_ip_address())
        self._cells = RemoteCells(cells, self._events)
        self._admission = admission(config)
        at_once = prompts_at_once(config)
        patience = Patience(config.cluster.max_resumes, config.cluster.queue_timeout_s)
        self._generation = Generation(model, self._cells, ingress.request_timeout_s, at_once, self._admission, patience)
        self._grpc = GrpcServer(self._generation, ingress.host, ingress.grpc_port, ingress.max_request_bytes)
        await self._grpc.start()
        self._readiness = Readiness(self._cells, self._grpc.set_serving)
        self._watching = asyncio.create_task(self._readiness.watch())
        logger.info("serving %s, gRPC on %s:%d", model.name, ingress.host, ingress.grpc_port)

    def __serve_build_asgi_app__(self) -> FastAPI:
        ingress = self._ingress
        return make_app(
            self._generation,
            self._readiness,
            ingress.max_request_bytes,
            ingress.body_timeout_s,
            ingress.cors_origins,
        )

    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests, as Unavailable; running ones have so long, then they are told why they end."""
        self._admission.close()
        await self._readiness.close()
        if not await self._admission.nothing_runs(timeout_s):
            self._generation.give_up(Unavailable("the service has shut down before this request was finished"))
            await self._admission.nothing_runs(_LAST_WORDS_S)

    async def shutdown(self) -> None:
        """Drains, and ends."""
        await self.drain(self._drain_timeout_s)
        self._watching.cancel()
        await self._grpc.stop(_LAST_WORDS_S)
        self._events.stop()
