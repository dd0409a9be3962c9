"""The application on Serve, as `up` drives it: deploy, watch it come up, tell why it did not, take it away."""

import contextlib
import io
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from actors.settings import DeviceChoice, tower_processes
from cluster.config import ServiceConfig
from cluster.local_ray import failures_told
from twotower.errors import CheckpointError, ConfigError, TwoTowerError, Unavailable

_OUR_ERROR = re.compile(r"twotower\.errors\.(\w+): (.+)")
_ANY_ERROR = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception)): (.+)", re.MULTILINE)
_STOP_S, _ANSWER_S = 15.0, 10.0
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the deployments are: replicas running of those wanted, by deployment's name."""

    routers: int
    cells: int
    failure: TwoTowerError | None = None


def check(config: ServiceConfig) -> None:
    """Raises CheckpointError or ConfigError for what cells and routers would refuse. Reads headers, needs no Ray."""
    from actors.cell import check_settings
    from cluster.app import cell_settings
    from cluster.served_model import load_served_model

    check_settings(cell_settings(config, gpus_in_cluster=0))
    load_served_model(config)


def deploy(config: ServiceConfig) -> None:
    """Hands the application to Serve; returns before it runs. Raises Unavailable."""
    from ray import serve

    from cluster.app import APP_NAME, build

    with failures_told("Serve"):
        target = serve.RunTarget(target=build(config), name=APP_NAME, route_prefix="/")
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def device(config: ServiceConfig) -> DeviceChoice:
    """What the towers run on, and why. Raises Unavailable."""
    import ray

    from cluster.app import device_choice

    with failures_told("Ray"):
        return device_choice(config, ray.cluster_resources().get("GPU", 0.0))


def crowded(config: ServiceConfig, device: str, cores: int) -> str | None:
    """What to say where towers take all cores of the one machine and leave none to routers, cells and clients; measured
    on two (README)."""
    cell = config.cell
    towers = tower_processes(cell.placement, cell.denoisers_per_context)
    if device != "cpu" or cell.placement != "split" or cores > towers:
        return None
    return f"{towers} tower processes on {cores} cores: --set cell.placement=colocated is faster here"


def shortage(config: ServiceConfig) -> str | None:
    """What the cluster, idle, lacks to hold the first cells; None where it has all."""
    import ray

    from actors.settings import bundles
    from cluster.app import cell_settings

    with failures_told("Ray"):
        there = ray.cluster_resources()
    wanted = bundles(cell_settings(config, there.get("GPU", 0.0)))
    return missing(wanted, config.cluster.min_cells, there)


def missing(cell: Sequence[Mapping[str, float]], cells: int, there: Mapping[str, float]) -> str | None:
    """The resources of which `cells` cells of these bundles want more than is `there`, in words."""
    lacking = []
    for name in ("GPU", "CPU"):
        wanted = cells * sum(bundle.get(name, 0.0) for bundle in cell)
        if wanted > there.get(name, 0.0) + _ROUNDING:
            lacking.append(f"{wanted:g} {name}s where Ray has {there.get(name, 0.0):g}")
    return f"{cells} {'cell wants' if cells == 1 else 'cells want'} {' and '.join(lacking)}" if lacking else None


def progress() -> Progress:
    """Where the application stands now. Raises Unavailable where Serve does not say within some seconds."""
    answers: SimpleQueue[Progress | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            answers.put(_progress())
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()  # Serve's own call has no deadline
    with failures_told("Serve"):
        try:
            answer = answers.get(timeout=_ANSWER_S)
        except Empty:
            raise Unavailable(f"Serve has not answered for {_ANSWER_S:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _progress() -> Progress:
    from ray import serve

    from cluster.app import APP_NAME

    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return Progress(0, 0)
    running = {
        name: sum(count for state, count in d.replica_states.items() if state == "RUNNING")
        for name, d in application.deployments.items()
    }
    failure = None
    if application.status == "DEPLOY_FAILED":
        messages = [d.message for d in application.deployments.values() if d.status == "DEPLOY_FAILED"]
        failure = failure_of(messages[0] if messages else application.message)
    return Progress(running.get("Router", 0), running.get("Cell", 0), failure)


def failure_of(message: str) -> TwoTowerError:
    """Why a deployment failed: a wrong setting or checkpoint as ConfigError, anything else as Unavailable."""
    ours = _OUR_ERROR.findall(message)
    wrong = bool(ours) and ours[-1][0] in (ConfigError.__name__, CheckpointError.__name__)
    return ConfigError(reason(message)) if wrong else Unavailable(reason(message))


def reason(message: str) -> str:
    """The one line of a deployment's message, tracebacks and all, that says what is wrong."""
    ours = _OUR_ERROR.findall(message)
    if ours:
        return str(ours[-1][1]).strip()
    others = _ANY_ERROR.findall(message)
    if others:
        return ": ".join(part.strip() for part in others[-1])
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def take_down() -> None:
    """Ends our application, and with our process our own Ray too. Waits no longer than some seconds for Serve."""
    import ray

    if not ray.is_initialized():
        return
    ending = threading.Thread(target=_delete, daemon=True)
    with contextlib.redirect_stdout(io.StringIO()):  # where Ray wonders at every process that ends
        ending.start()
        ending.join(_STOP_S)
        ray.shutdown()


def _delete() -> None:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from cluster.app import APP_NAME

    with contextlib.suppress(RayError, RayServeException):  # Serve may not have come up yet
        serve.delete(APP_NAME)
