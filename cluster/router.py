"""One router of the service: both faces in one process, without weights and without a GPU."""

import asyncio
import logging
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from actors.process_logs import log_to_stderr
from cluster.config import ServiceConfig
from cluster.event_lines import EventServer
from cluster.generation import Generation
from cluster.grpc_service import GrpcServer
from cluster.http import make_app
from cluster.local_ray import bypass_proxies
from cluster.readiness import Readiness
from cluster.remote_cells import RemoteCells
from cluster.served_model import load_served_model

logger = logging.getLogger(__name__)


def prompts_at_once(config: ServiceConfig) -> int:
    """How many prompts of one call the cells hold at a time: half of what one cell decodes at once."""
    return max(1, config.cell.max_sequences // 2)


class Router:
    """Serve awaits the constructor, then asks for the ASGI app; the gRPC server listens beside it."""

    async def __init__(self, config: ServiceConfig, cells: "DeploymentHandle[Any]") -> None:  # type: ignore[misc]
        log_to_stderr()
        bypass_proxies()  # before the handle connects to a cell
        ingress = config.ingress
        self._drain_timeout_s, self._max_bytes = config.cluster.drain_timeout_s, ingress.max_request_bytes
        model = await asyncio.to_thread(load_served_model, config)
        self._events = EventServer()
        await self._events.start(get_node_ip_address())
        remote = RemoteCells(cells, self._events)
        self._generation = Generation(model, remote, ingress.request_timeout_s, prompts_at_once(config))
        self._grpc = GrpcServer(self._generation, ingress.host, ingress.grpc_port, self._max_bytes)
        await self._grpc.start()
        self._readiness = Readiness(remote, self._grpc.set_serving)
        self._watching = asyncio.create_task(self._readiness.watch())
        logger.info("serving %s, gRPC on %s:%d", model.name, ingress.host, ingress.grpc_port)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._generation, self._readiness, self._max_bytes)

    async def shutdown(self) -> None:
        """Stops taking gRPC calls, lets the running ones finish, ends."""
        self._watching.cancel()
        await self._grpc.stop(self._drain_timeout_s)
        self._events.stop()
