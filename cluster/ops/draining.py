"""The orderly end of a service: every router finishes its running requests and refuses new ones."""

import threading
import time
from collections.abc import Callable

from twotower.errors import Unavailable

_SLACK_S = 10.0  # seconds for routers to end the rest, and for Serve to report it
_AT_ONCE_S = 1.0
_AGAIN_S = 0.1


def drain(mark: bytes | None, timeout_s: float, say: Callable[[str], None]) -> None:
    """As `finish`, but an interruption ends the requests at once."""
    try:
        say("stopping")
        finish(mark, timeout_s, say, "; Ctrl-C once more ends them now")
    except KeyboardInterrupt:
        say("ending the running requests now")
        _start(mark, 0.0, say).wait(_SLACK_S)


def finish(mark: bytes | None, timeout_s: float, say: Callable[[str], None], hint: str = "") -> None:
    """Waits for the running requests of all routers of the mark's application, which may be one that the mark's holder
    replaces. A request that runs longer than `timeout_s` ends with an error.

    New requests get 503 meanwhile. Returns at once without running requests or without routers.
    """
    done = _start(mark, timeout_s, say)
    if not done.wait(_AT_ONCE_S):
        say(f"finishing the running requests, for {timeout_s:g} s at most{hint}")
        done.wait(timeout_s + _SLACK_S)


def _start(mark: bytes | None, timeout_s: float, say: Callable[[str], None]) -> threading.Event:
    """On a thread, because Serve's own calls cannot be interrupted."""
    done = threading.Event()
    threading.Thread(target=_drain, args=(mark, timeout_s, say, done), daemon=True).start()
    return done


def _drain(mark: bytes | None, timeout_s: float, say: Callable[[str], None], done: threading.Event) -> None:
    try:
        _ask_routers(mark, timeout_s)
    except Exception as error:
        say(f"not all routers have finished their requests: {type(error).__name__}: {error}")
    finally:
        done.set()


def _ask_routers(mark: bytes | None, timeout_s: float) -> None:
    """Asks until the routers were reached: a new Serve handle may not know any replica yet, and then reports none."""
    import ray
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import DeploymentUnavailableError

    from cluster.app import APP_NAME
    from cluster.ops import deployment, ownership

    ends_at = time.monotonic() + timeout_s + _SLACK_S
    while mark is not None and ray.is_initialized() and ownership.holder() == mark and deployment.routers():
        left_s = max(0.0, ends_at - time.monotonic())
        asked = serve.get_deployment_handle("Router", APP_NAME).broadcast("drain", min(timeout_s, left_s))
        try:
            answers = asked.results(timeout_s=left_s, return_exceptions=True)
        except DeploymentUnavailableError:
            answers = []
        failed = [
            answer for answer in answers if isinstance(answer, Exception) and not isinstance(answer, RayActorError)
        ]
        if answers and not failed:
            return
        if not left_s:
            raise failed[0] if failed else Unavailable("Serve's handle knows of no router, though one runs")
        time.sleep(_AGAIN_S)
