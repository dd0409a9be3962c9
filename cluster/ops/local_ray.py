"""Ray and Serve on this machine, on loopback only. Import this before anything imports Ray."""

import contextlib
import glob
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.no_proxies import bypass_proxies
from cluster.ops.ray_room import check_room, ray_directory
from twotower.errors import TwoTowerError, Unavailable
from twotower.showing import one_line

if TYPE_CHECKING:  # preparing an environment needs no pydantic
    from cluster.sections import IngressSection

CHECKOUT = Path(__file__).resolve().parents[2]
# 127.0.0.1 would be silently replaced by the machine's outside address.
_NODE_IP = "127.0.0.2"
_REACH_S = 5.0
_LOOK_S = 0.01
_OBJECT_STORE_BYTES = 128 * 2**20  # tensors do not use it
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a hung cell must free its GPUs
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # our code never blocks a loop; see docs/adr/0007
    # A prompt of some 13 million tokens between router and cell; cluster/message_size.py
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 * 2**20),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.faces.http.proxy_answers:middlewares",
    "RAY_DEDUP_LOGS": "0",  # it merges lines that differ only in a process id
    "RAY_local_fs_capacity_threshold": "1",  # a disk 95 % full may have room enough; see ray_room.py
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare_environment() -> None:
    """Sets the variables that Ray reads at import, and lets every worker import this checkout from any directory."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    bypass_proxies()
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(CHECKOUT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, paths)])


def start_ray(address: str | None = None, show_worker_logs: bool = False, **options: Any) -> None:
    """A Ray of our own on loopback, or a running one at `address`. Raises Unavailable."""
    if address is not None:
        _check_reachable(address)
    else:
        check_room(_OBJECT_STORE_BYTES)
        _draw_token()
    with failures_told("Ray" if address is None else f"the Ray at {address}"):
        _init(address, show_worker_logs, options)


def _init(address: str | None, show_worker_logs: bool, options: dict[str, Any]) -> None:
    import ray

    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    if address is not None:
        ray.init(address=address, log_to_driver=show_worker_logs, logging_level=logging.WARNING, **options)
        return
    ray.init(
        address="local",
        num_cpus=_cores(),
        include_dashboard=False,
        log_to_driver=show_worker_logs,
        logging_level=logging.WARNING,
        object_store_memory=_OBJECT_STORE_BYTES,
        _node_ip_address=_NODE_IP,
        **options,
    )


@contextlib.contextmanager
def session_told(tell: Callable[[str], None]) -> Iterator[None]:
    """Reports the directory with sockets and logs of the Ray that this process starts meanwhile. It does so as soon as
    Ray makes the directory, before a process of that Ray can outlive this one.
    """
    before, over = set(_sessions()), threading.Event()

    def watch() -> None:
        last_look = False
        while not last_look:
            last_look = over.wait(_LOOK_S)
            for session in sorted(set(_sessions()) - before)[:1]:
                tell(session)
                return

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _sessions() -> list[str]:
    """All session directories that Ray has made for a process with this id, which ends their names."""
    return glob.glob(f"{glob.escape(os.path.realpath(ray_directory()))}/session_*_{os.getpid()}")


def _draw_token() -> None:
    """A secret for our own Ray, which would otherwise write one into HOME, which may not be writable."""
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _cores() -> int | None:
    """The cores that this process may use, if not all of the machine's; None leaves the count to Ray, which knows
    containers.
    """
    allowed = len(os.sched_getaffinity(0))
    return allowed if allowed < (os.cpu_count() or 1) else None


def _check_reachable(address: str) -> None:
    """Ray itself retries a wrong address for many minutes, and then ends the process."""
    host, _, port = address.rpartition(":")
    if "/" in host or not (host and port.isdecimal()):
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _REACH_S):
            pass
    except (OSError, OverflowError) as error:
        raise Unavailable(f"--address: no Ray answers on {one_line(address)}: {one_line(str(error))}") from None


@contextlib.contextmanager
def failures_told(who: str) -> Iterator[None]:
    """Turns errors of Ray and Serve into one line that names them."""
    try:
        yield
    except TwoTowerError:
        raise
    except Exception as error:
        raise Unavailable(f"{who} does not work: {type(error).__name__}: {one_line(str(error))}") from error


def serve_runs() -> bool:
    """Whether this Ray has a Serve already. Raises Unavailable."""
    from ray.serve.context import _get_global_client

    with failures_told("Serve"):
        return _get_global_client(raise_if_no_controller_running=False) is not None


def start_serve(ingress: "IngressSection") -> None:
    """Start Serve's controller and its HTTP proxy. Raises Unavailable, or ConfigError if Serve runs with another port
    or other certificates.
    """
    with failures_told("Serve"):
        _start_serve(ingress)


def _start_serve(ingress: "IngressSection") -> None:
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import LoggingConfig

    from cluster.http_options import check_same, http_options

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        serve.start(http_options=http_options(ingress), logging_config=quiet)
    else:
        check_same(running.http_config, ingress)
