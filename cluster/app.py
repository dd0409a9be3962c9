"""The Serve application: `build(args)` for `python -m cluster up`, Serve YAML files and RayService manifests alike.

Plain classes become deployments here, and nowhere else.
"""

import logging
from collections.abc import Mapping
from typing import Any, cast

import ray
from ray import serve
from ray.serve import Application

from actors.settings import STRATEGY, CellSettings, bundles
from cluster.cell import Cell
from cluster.config import ServiceConfig
from cluster.placing import Nodes, choose
from cluster.request_body import MAX_BODIES
from cluster.router import Router, admission
from cluster.runs.routing import ElsewhereFirst
from cluster.served_paths import checkpoint_directory
from twotower.engine.settings import EngineSettings

logger = logging.getLogger(__name__)

APP_NAME = "twotower"
# Beyond what the ledger takes, so that it is the ledger that refuses, and health checks get through.
_HEADROOM = 16
# Beyond what a router has under way and lets arrive, so that it is the router that refuses, and answers probes at once.
_PROBES = 1024
_ROUTER_CPUS = 0.1
_LOAD_AVERAGED_S = 10.5  # Serve wants more than 10
_CONSTRUCTOR_TRIES = 1
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}  # Serve's own lines; ours go to stderr


class CellReplica(Cell):
    """A Cell as Serve names it and ends it."""

    async def __init__(self, settings: CellSettings) -> None:  # type: ignore[misc]
        await super().__init__(settings, name=serve.get_replica_context().replica_id.unique_id)

    async def __del__(self) -> None:
        await self.shutdown()


class RouterReplica(Router):
    """A Router as Serve ends it."""

    async def __del__(self) -> None:
        await self.shutdown()


def build(args: Mapping[str, Any] | ServiceConfig) -> Application:
    """The application of a configuration. Raises ConfigError naming every wrong setting."""
    config = args if isinstance(args, ServiceConfig) else ServiceConfig.parse(args)
    choice = choose(config, nodes_there())  # once, for all cells that are ever to come
    logger.info("%s", choice.why)
    cells = cell_deployment(choice.config).bind(cell_settings(choice.config))
    return router_deployment(choice.config).bind(choice.config, cells)


def cell_settings(config: ServiceConfig) -> CellSettings:
    """What the actors are told of a configuration without `auto`."""
    cell = config.cell
    engine = EngineSettings(
        max_sequences=cell.max_sequences,
        max_sequence_length=config.model.max_sequence_length,
        cache_tokens=cell.cache_tokens,
        prefill_chunk_tokens=cell.prefill_chunk_tokens,
        link_timeout_s=cell.link_timeout_s,
        stall_timeout_s=cell.stall_timeout_s,
        start_timeout_s=cell.start_timeout_s,
        capture=cell.capture,
        max_queued_requests=config.cluster.max_queued_requests,
    )
    return CellSettings(
        checkpoint=str(checkpoint_directory(config.model.checkpoint)),
        dtype=config.model.dtype,
        device=cell.device,
        placement=cell.placement,
        denoisers_per_context=cell.denoisers_per_context,
        gpus_per_tower=cell.gpus_per_tower,
        ssm_wire_dtype=cell.ssm_wire_dtype,
        engine=engine,
    )


def cell_deployment(config: ServiceConfig) -> serve.Deployment:
    """Cells scale as units; Serve's queues follow from the cell's own ledger. Takes a configuration without `auto`."""
    cluster = config.cluster
    requested = bundles(cell_settings(config))
    return _deployment(CellReplica).options(
        name="Cell",
        autoscaling_config={
            "min_replicas": cluster.min_cells,
            "max_replicas": cluster.max_cells,
            "target_ongoing_requests": cluster.target_ongoing_requests,
            "upscale_delay_s": cluster.upscale_delay_s,
            "downscale_delay_s": cluster.downscale_delay_s,
            "look_back_period_s": _LOAD_AVERAGED_S,
        },
        max_ongoing_requests=_ongoing_requests(config),
        max_queued_requests=-1,  # the routers bound what they let in, and the cell's ledger what waits
        request_router_config={"request_router_class": f"{ElsewhereFirst.__module__}:{ElsewhereFirst.__name__}"},
        max_constructor_retry_count=_CONSTRUCTOR_TRIES,
        graceful_shutdown_timeout_s=cluster.drain_timeout_s,
        health_check_period_s=1.0,
        health_check_timeout_s=30.0,
        placement_group_bundles=requested,
        placement_group_strategy=STRATEGY,
        ray_actor_options={"num_cpus": requested[0]["CPU"]},
        logging_config=_LOGGING,
    )


def router_deployment(config: ServiceConfig) -> serve.Deployment:
    """Routers are of fixed number: a change among ingress replicas cuts streams."""
    replica = serve.ingress()(RouterReplica)
    return _deployment(replica).options(
        name="Router",
        num_replicas=config.cluster.num_routers,
        max_ongoing_requests=admission(config).capacity + MAX_BODIES + _PROBES,
        max_constructor_retry_count=_CONSTRUCTOR_TRIES,
        graceful_shutdown_timeout_s=config.cluster.drain_timeout_s,
        ray_actor_options={"num_cpus": _ROUTER_CPUS},
        logging_config=_LOGGING,
    )


def _deployment(replica: Any) -> serve.Deployment:
    return cast(serve.Deployment, serve.deployment(replica))


def _ongoing_requests(config: ServiceConfig) -> int:
    return config.cell.max_sequences + config.cluster.max_queued_requests + _HEADROOM


def nodes_there() -> Nodes:
    """What each node of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
