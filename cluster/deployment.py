"""The application on Serve, as `up` drives it: deploy, watch it come up, tell why it did not, take it away."""

import contextlib
import io
import re
import threading
from dataclasses import dataclass

from cluster.config import ServiceConfig

_OUR_ERROR = re.compile(r"twotower\.errors\.(\w+): (.+)")
_ANY_ERROR = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception)): (.+)", re.MULTILINE)
_STOP_S = 15.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the deployments are: replicas running of those wanted, by deployment's name."""

    routers: int
    cells: int
    failure: str | None = None


def deploy(config: ServiceConfig) -> None:
    """Hands the application to Serve; returns before it runs."""
    from ray import serve

    from cluster.app import APP_NAME, build

    target = serve.RunTarget(target=build(config), name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def progress() -> Progress:
    """Where the application stands now."""
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
        failure = reason(messages[0] if messages else application.message)
    return Progress(running.get("Router", 0), running.get("Cell", 0), failure)


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
