"""`python -m cluster up`: from a configuration to a service that answers, and down again without a trace."""

import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from types import FrameType

import psutil

from cluster import deployment, local_ray, run_state, served_paths
from cluster.config import ServiceConfig
from cluster.run_state import RunState
from twotower.errors import TwoTowerError, Unavailable

_POLL_S = 0.25
_WATCH_S = 2.0


class Up:
    """One run of `up`."""

    def __init__(self, config: ServiceConfig, address: str | None, verbose: bool) -> None:
        self._config, self._address, self._verbose = config, address, verbose
        self._began = time.monotonic()
        self._state = self._first_state()

    def run(self) -> None:
        """Serves until SIGINT or SIGTERM. Raises a TwoTowerError if it never came up."""
        served_paths.check_directory(self._config.model.checkpoint)
        self._check_ports()
        _listen_to_signals()
        port = self._config.ingress.http_port
        try:
            self._start()
            self._wait_until_ready()
            run_state.write(port, self._state)
            self._say("ready")
            print(_what_next(self._state, served_paths.example_prompt(self._config.model.checkpoint)), flush=True)
            self._watch()
        except KeyboardInterrupt:
            self._say("stopping")
        finally:
            run_state.remove(port)
            deployment.take_down()
        self._say("stopped")

    def _start(self) -> None:
        self._say("starting Ray" if self._address is None else f"joining the Ray at {self._address}")
        local_ray.prepare_environment()
        local_ray.start_ray(self._address, show_worker_logs=self._verbose)
        _listen_to_signals()  # Ray has put its own there
        self._say("starting Serve")
        ingress = self._config.ingress
        local_ray.start_serve(ingress.host, ingress.http_port)
        deployment.deploy(self._config)
        self._say(f"loading the towers ({self._config.cell.placement}) of {self._config.model.checkpoint}")

    def _wait_until_ready(self) -> None:
        told = deployment.Progress(0, 0)
        while True:
            now = deployment.progress()
            if now.failure is not None:
                raise Unavailable(now.failure)
            if now.routers > told.routers:
                self._say(f"{now.routers} of {self._config.cluster.num_routers} routers running")
            if now.cells > told.cells:
                self._say(f"{now.cells} of {self._config.cluster.min_cells} cells running")
            told = now
            if now.routers and now.cells and is_ready(self._state.http):
                self._state = replace(self._state, cells=now.cells)
                return
            time.sleep(_POLL_S)

    def _watch(self) -> None:
        """Until interrupted; tells when cells come and go."""
        while True:
            time.sleep(_WATCH_S)
            cells = deployment.progress().cells
            if cells != self._state.cells:
                self._say(f"{cells} cells running")
                self._state = replace(self._state, cells=cells)
                run_state.write(self._config.ingress.http_port, self._state)

    def _check_ports(self) -> None:
        ingress = self._config.ingress
        for name, port in (("http_port", ingress.http_port), ("grpc_port", ingress.grpc_port)):
            try:
                with socket.create_server((ingress.host, port)):
                    pass
            except OSError as error:
                other = run_state.running().get(ingress.http_port)
                whose = f" (by your service, pid {other.pid})" if other else ""
                raise PortTaken(
                    f"ingress.{name}: cannot listen on {ingress.host}:{port}{whose}: {os.strerror(error.errno or 0)}; "
                    f"choose another with --set ingress.{name}=PORT"
                ) from None

    def _first_state(self) -> RunState:
        ingress, me = self._config.ingress, psutil.Process()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(ingress.host, ingress.host)
        host = f"[{host}]" if ":" in host else host
        http, grpc = f"{host}:{ingress.http_port}", f"{host}:{ingress.grpc_port}"
        return RunState(os.getpid(), me.create_time(), http, grpc, self._config.model.checkpoint)

    def _say(self, what: str) -> None:
        print(f"[{time.monotonic() - self._began:5.1f} s] {what}", file=sys.stderr, flush=True)


class PortTaken(TwoTowerError):
    """Another process listens where the service should."""


def _listen_to_signals() -> None:
    """Both mean: stop in good order. A script's background job would otherwise ignore SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def is_ready(http: str) -> bool:
    """Whether `/ready` says so."""
    try:
        with urllib.request.urlopen(f"http://{http}/ready", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _what_next(state: RunState, prompt: str | list[int]) -> str:
    text = isinstance(prompt, str)
    shell = f"--prompt $'{json.dumps(prompt)[1:-1]}'" if text else f"--prompt-token-ids {','.join(map(str, prompt))}"
    return f"""
The service answers on http://{state.http} (OpenAI's API) and {state.grpc} (gRPC). In another terminal, try:

  curl http://{state.http}/v1/completions -H 'content-type: application/json' \\
    -d '{json.dumps({"prompt": prompt, "max_tokens": 64})}'
  python -m cluster generate {shell}

Ctrl-C stops it."""
