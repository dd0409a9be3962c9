"""The Serve application: `build(args)` for `python -m cluster up`, Serve YAML files and RayService manifests alike.

Plain classes become deployments here, and nowhere else.
"""

import logging
from collections.abc import Mapping
from typing import Any, cast

import ray
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from actors.settings import STRATEGY, CellSettings, bundles
from cluster.board.siblings import ServeRouters
from cluster.cell import Cell
from cluster.config import ServiceConfig
from cluster.faces.http.request_body import MAX_BODIES
from cluster.http_options import TLS, check_same
from cluster.placing import ROUTER_CPUS, Nodes, choose
from cluster.router import LAST_WORDS_S, Router, admission
from cluster.runs.routing import ElsewhereFirst
from cluster.runs.served_model import served_name
from cluster.scaling import Policy
from cluster.served_paths import checkpoint_directory

logger = logging.getLogger(__name__)

APP_NAME = "twotower"
# More than the ledger takes, so that the ledger refuses and health checks get through.
_HEADROOM = 16
# More than a router holds and lets arrive, so that the router refuses and answers probes at once.
_PROBES = 1024
# Serve calls the first deprecated in favour of a variable of the environment that nothing in 2.60 reads.
_LOAD_TOLD_S, _LOAD_KEPT_S = 1.0, 2.0  # the policy uses the newest report; Serve wants the second number to be larger
_SURGE = 100  # percent: after a change as many new replicas start as there are old ones, which then end
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}  # Serve's own lines; ours go to stderr


class CellReplica(Cell):
    """A Cell with Serve's name and end."""

    async def __init__(self, settings: CellSettings, model: str) -> None:  # type: ignore[misc]
        await super().__init__(settings, name=serve.get_replica_context().replica_id.unique_id, model=model)

    async def __del__(self) -> None:
        await self.shutdown()


class RouterReplica(Router):
    """A Router with Serve's name and end."""

    async def __init__(self, config: ServiceConfig, cells: "DeploymentHandle[Any]") -> None:  # type: ignore[misc]
        replica = serve.get_replica_context().replica_id
        routers = ServeRouters(replica.deployment_id.name, replica.deployment_id.app_name)
        await super().__init__(config, cells, replica.unique_id, routers)

    async def __del__(self) -> None:
        await self.shutdown()


def build(args: Mapping[str, Any] | ServiceConfig) -> Application:
    """The application of a configuration. Raises ConfigError naming every wrong setting. Also raises it if Serve's HTTP
    proxies do not speak TLS as configured; a Serve YAML sets that in `http_options`.
    """
    config = args if isinstance(args, ServiceConfig) else ServiceConfig.parse(args)
    serving = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    if serving is not None:
        check_same(serving.http_config, config.ingress, TLS)
    choice = choose(config, nodes_there())  # once, for all later cells
    logger.info("%s", choice.why)
    cells = cell_deployment(choice.config).bind(cell_settings(choice.config), served_name(choice.config))
    return router_deployment(choice.config).bind(choice.config, cells)


def cell_settings(config: ServiceConfig) -> CellSettings:
    """The actors' settings, from a configuration without `auto`."""
    cell = config.cell
    return CellSettings(
        str(checkpoint_directory(config.model.checkpoint)),
        device=cell.device,
        dtype=config.model.dtype,
        placement=cell.placement,
        denoisers_per_context=cell.denoisers_per_context,
        gpus_per_tower=cell.gpus_per_tower,
        ssm_wire_dtype=cell.ssm_wire_dtype,
        engine=config.engine,
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
            "policy": {
                "policy_function": f"{Policy.__module__}:{Policy.__name__}",
                "policy_kwargs": {"fullness": cluster.target_fullness},
            },
            "upscale_delay_s": cluster.upscale_delay_s,
            "downscale_delay_s": cluster.downscale_delay_s,
            "metrics_interval_s": _LOAD_TOLD_S,
            "look_back_period_s": _LOAD_KEPT_S,
        },
        max_ongoing_requests=_ongoing_requests(config),
        max_queued_requests=-1,  # the routers bound what they let in, and the cell's ledger what waits
        request_router_config={"request_router_class": f"{ElsewhereFirst.__module__}:{ElsewhereFirst.__name__}"},
        max_constructor_retry_count=cluster.start_tries,
        graceful_shutdown_timeout_s=cluster.drain_timeout_s,
        max_surge_percent=_SURGE if cluster.surge else 0,
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,  # Serve replaces the cell after three failures in a row
        placement_group_bundles=requested,
        placement_group_strategy=STRATEGY,
        ray_actor_options={"num_cpus": requested[0]["CPU"]},
        logging_config=_LOGGING,
    )


def router_deployment(config: ServiceConfig) -> serve.Deployment:
    """The number of routers is fixed: a change among ingress replicas cuts streams.

    Serve starts each router on another node than the last, if possible. `max_replicas_per_node` is not set: with it a
    lost node's router, or a newer version's, would wait for a node of its own.
    """
    replica = serve.ingress()(RouterReplica)
    return _deployment(replica).options(
        name="Router",
        num_replicas=config.cluster.routers,
        max_ongoing_requests=admission(config).most + MAX_BODIES + _PROBES,
        max_constructor_retry_count=config.cluster.start_tries,
        graceful_shutdown_timeout_s=config.cluster.drain_timeout_s + 2 * LAST_WORDS_S,
        health_check_period_s=1.0,  # from which a router knows when Serve began to remove it
        max_surge_percent=_SURGE,  # a router needs no GPU
        ray_actor_options={"num_cpus": ROUTER_CPUS},
        logging_config=_LOGGING,
    )


def _deployment(replica: Any) -> serve.Deployment:
    return cast(serve.Deployment, serve.deployment(replica))


def _ongoing_requests(config: ServiceConfig) -> int:
    return config.engine.max_sequences + config.engine.max_queued_requests + _HEADROOM


def nodes_there() -> Nodes:
    """The resources of each node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
