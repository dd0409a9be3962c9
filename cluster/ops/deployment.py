"""The application on Serve, for `up`: deploy it, watch it start, explain a failure, remove it."""

import contextlib
import io
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from actors.settings import bundles
from cluster.config import ServiceConfig
from cluster.ops.local_ray import failures_told
from cluster.placing import Choice, Nodes, choose, missing
from twotower.errors import CheckpointError, ConfigError, TwoTowerError, Unavailable

_OUR_ERROR = re.compile(r"twotower\.errors\.(\w+): (.+)")
_ANY_ERROR = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception)): (.+)", re.MULTILINE)
_STOP_S, _ANSWER_S, _POLL_S = 15.0, 10.0, 0.25


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of the deployments: running and wanted replicas, by the deployment's name.

    `failure`: why they will not start. `lost`: why the application no longer belongs to the asking `up`.
    """

    routers: int
    cells: int
    failure: TwoTowerError | None = None
    lost: str | None = None


def check(config: ServiceConfig) -> None:
    """Raises CheckpointError or ConfigError for errors that cells and routers would find. Reads headers,
    needs no Ray.
    """
    from actors.settings import check_settings
    from cluster import certificates
    from cluster.app import cell_settings
    from cluster.runs.keys import read_keys
    from cluster.runs.served_model import load_served_model

    if config.ingress.keys_file is not None:
        read_keys(Path(config.ingress.keys_file))
    if (files := certificates.Files.of(config.ingress)) is not None:
        certificates.read(files)
    check_settings(cell_settings(choose(config, nodes=()).config), asked=config.cell.placement)
    load_served_model(config)


def choice(config: ServiceConfig) -> Choice:
    """The configuration without `auto`, chosen by the running Ray's resources. Raises Unavailable."""
    return choose(config, _nodes())


def check_free(where: str) -> None:
    """Raises Unavailable if our application is on this Ray already."""
    from cluster.ops import ownership

    with failures_told("Ray"):
        ownership.check_free(where)


def take(mark: bytes, where: str, replace: bool) -> None:
    """Take the application's place on this Ray for this mark. Raises Unavailable if an application is there and is not
    to be replaced.
    """
    from cluster.ops import ownership

    with failures_told("Ray"):
        ownership.take(mark, where, replace)


def clear_place(within_s: float) -> None:
    """Ends the present application; otherwise its replicas would pass for ours. Raises Unavailable if it stays."""
    from ray import serve

    from cluster.app import APP_NAME

    with failures_told("Serve"):
        serve.delete(APP_NAME, _blocking=False)  # Serve's own wait has a limit of its own
        if not _gone(within_s):
            raise Unavailable(f"--replace: the running application has not ended within {within_s:g} s")


def _gone(within_s: float) -> bool:
    """Waits at most so many seconds for the application's end. Returns whether it has ended.

    Without Ray it has ended: Serve's status would join another Ray of this machine, or start one.
    """
    import ray
    from ray import serve

    from cluster.app import APP_NAME

    deadline = time.monotonic() + within_s
    while ray.is_initialized() and APP_NAME in serve.status().applications:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def deploy(config: ServiceConfig) -> None:
    """Hands the application to Serve; returns before it runs. Raises Unavailable."""
    from ray import serve

    from cluster.app import APP_NAME, build

    with failures_told("Serve"):
        target = serve.RunTarget(target=build(config), name=APP_NAME, route_prefix="/")
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def shortage(config: ServiceConfig) -> str | None:
    """The resources that an idle cluster lacks for the first cells; None if it lacks none. Raises Unavailable."""
    from cluster.app import cell_settings

    nodes = _nodes()
    return missing(bundles(cell_settings(choose(config, nodes).config)), config.cluster.min_cells, nodes)


def _nodes() -> Nodes:
    from cluster.app import nodes_there

    with failures_told("Ray"):
        return nodes_there()


def progress(mark: bytes | None = None) -> Progress:
    """The application's progress, and whether it still has this mark. Raises Unavailable if Serve does not answer
    within some seconds.
    """
    answers: SimpleQueue[Progress | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            answers.put(_progress(mark))
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


def _progress(mark: bytes | None) -> Progress:
    from ray import serve

    from cluster.app import APP_NAME
    from cluster.ops import ownership

    application = serve.status().applications.get(APP_NAME)
    if mark is not None and ownership.holder() not in (mark, None):
        return Progress(0, 0, lost="another `up` has replaced it")
    if application is None or application.status == "DELETING":
        return Progress(0, 0, lost=None if mark is None else "somebody has deleted it")
    failure = None
    if application.status == "DEPLOY_FAILED":
        messages = [d.message for d in application.deployments.values() if d.status == "DEPLOY_FAILED"]
        failure = failure_of(messages[0] if messages else application.message)
    return Progress(_running(application, "Router"), _running(application, "Cell"), failure)


def routers() -> int:
    """The number of running routers. Waits for Serve without a limit."""
    from ray import serve

    from cluster.app import APP_NAME

    application = serve.status().applications.get(APP_NAME)
    return 0 if application is None else _running(application, "Router")


def _running(application: Any, name: str) -> int:
    """The number of this deployment's running replicas, by Serve's status of the application."""
    deployment = application.deployments.get(name)
    return 0 if deployment is None else sum(n for state, n in deployment.replica_states.items() if state == "RUNNING")


def failure_of(message: str) -> TwoTowerError:
    """Why a deployment failed: a wrong setting or checkpoint as ConfigError, anything else as Unavailable."""
    ours = _OUR_ERROR.findall(message)
    wrong = bool(ours) and ours[-1][0] in (ConfigError.__name__, CheckpointError.__name__)
    return ConfigError(reason(message)) if wrong else Unavailable(reason(message))


def reason(message: str) -> str:
    """The line with the error in a deployment's message, which may contain tracebacks."""
    ours = _OUR_ERROR.findall(message)
    if ours:
        return str(ours[-1][1]).strip()
    others = _ANY_ERROR.findall(message)
    if others:
        return ": ".join(part.strip() for part in others[-1])
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def take_down(mark: bytes | None) -> None:
    """Ends the application if it has this mark; our own Ray ends with our process. Waits at most some seconds for
    Serve.
    """
    import ray

    if not ray.is_initialized():
        return
    ending = threading.Thread(target=delete, args=(mark,), daemon=True)
    with contextlib.redirect_stdout(io.StringIO()):  # because Ray logs every process that ends
        ending.start()
        ending.join(_STOP_S)
        ray.shutdown()


def delete(mark: bytes | None) -> None:
    """Ends the application if it has this mark."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from cluster.app import APP_NAME
    from cluster.ops import ownership

    with contextlib.suppress(RayError, RayServeException):  # Serve may not have started yet
        if mark is not None and ownership.holder() == mark:
            serve.delete(APP_NAME, _blocking=False)
            ownership.give_up(mark)
            _gone(_STOP_S)
