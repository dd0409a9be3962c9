"""The end of a service in good order: every router finishes what it has begun and refuses what is new."""

import contextlib
import threading
from collections.abc import Callable

_SLACK_S = 10.0  # for routers to tell what they give up, and for Serve to tell us
_AT_ONCE_S = 1.0


def drain(mark: bytes | None, timeout_s: float, say: Callable[[str], None]) -> None:
    """As `finish`. An interruption ends the requests at once."""
    try:
        finish(mark, timeout_s, say, "; Ctrl-C once more ends them now")
    except KeyboardInterrupt:
        say("ending the running requests now")
        _start(mark, 0.0).wait(_SLACK_S)


def finish(mark: bytes | None, timeout_s: float, say: Callable[[str], None], hint: str = "") -> None:
    """Waits for the running requests of all routers of the application that this mark is responsible for. That may be
    an application which the mark's holder replaces. A request that runs longer than `timeout_s` ends with an error.

    New requests get 503 meanwhile. Returns at once where no request runs, or no router is there.
    """
    done = _start(mark, timeout_s)
    if not done.wait(_AT_ONCE_S):
        say(f"finishing the running requests, for {timeout_s:g} s at most{hint}")
        done.wait(timeout_s + _SLACK_S)


def _start(mark: bytes | None, timeout_s: float) -> threading.Event:
    """On a thread, for Serve's own calls cannot be interrupted."""
    done = threading.Event()
    threading.Thread(target=_drain, args=(mark, timeout_s, done), daemon=True).start()
    return done


def _drain(mark: bytes | None, timeout_s: float, done: threading.Event) -> None:
    import ray
    from ray import serve

    from cluster.app import APP_NAME
    from cluster.ops import ownership

    try:
        with contextlib.suppress(Exception):  # whatever is gone already has nothing to finish
            if mark is not None and ray.is_initialized() and ownership.holder() == mark:
                routers = serve.get_deployment_handle("Router", APP_NAME).broadcast("drain", timeout_s)
                routers.results(timeout_s=timeout_s + _SLACK_S, return_exceptions=True)
    finally:
        done.set()
