"""`python -m cluster up`: from a configuration to a service that answers, and down again without a trace."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from types import FrameType

import psutil

from cluster import deployment, draining, local_ray, ports, run_state, served_paths
from cluster.client import is_ready
from cluster.config import ServiceConfig
from cluster.deployment import Progress
from cluster.invocation import command
from cluster.run_state import RunState
from twotower.errors import CheckpointError, ConfigError, Unavailable

_POLL_S = 0.25
_WATCH_S = 2.0
_START_SLACK_S = 60.0  # beyond what the towers may take to load
_SILENCE_S = 30.0  # so long Serve may be without a controller, which Ray restarts


class Up:
    """One run of `up`."""

    def __init__(self, config: ServiceConfig, address: str | None, verbose: bool, replace: bool = False) -> None:
        self._config, self._address, self._verbose, self._replace = config, address, verbose, replace
        self._mark: bytes | None = None
        self._began = self._heard = time.monotonic()
        self._state = self._first_state()

    def run(self) -> None:
        """Serves until SIGINT or SIGTERM. Raises a TwoTowerError if it never came up, or is not this one's any more."""
        port = self._config.ingress.http_port
        ports.check_host(self._config.ingress.host)
        run_state.directory()
        with ports.held(**self._ports):
            if self._address is None:
                self._check_ports()
            _listen_to_signals()
            self._check_model()
            try:
                self._start()
                self._wait_until_ready()
                run_state.write(port, self._state)
                self._say("ready")
                prompt = served_paths.example_prompt(self._config.model.checkpoint)
                print(_what_next(self._state, prompt), flush=True)
                self._watch()
            except KeyboardInterrupt:
                self._say("stopping")
                draining.drain(self._mark, self._config.cluster.drain_timeout_s, self._say)
            finally:
                run_state.remove(port)
                deployment.take_down(self._mark)
        self._say("stopped")

    def _start(self) -> None:
        self._say("starting Ray" if self._address is None else f"joining the Ray at {self._address}")
        local_ray.start_ray(self._address, show_worker_logs=self._verbose)
        _listen_to_signals()  # Ray has put its own there
        if self._address is not None:
            self._check_joined(self._address)
        choice = deployment.choice(self._config)
        self._config = choice.config
        self._say(choice.why)
        self._check_room()
        self._say("starting Serve")
        ingress = self._config.ingress
        local_ray.start_serve(ingress.host, ingress.http_port)
        if self._replace:
            self._say("ending the application that is there")
        self._mark = deployment.take(self._address or "this machine", self._replace)
        deployment.deploy(self._config)
        self._heard = time.monotonic()
        hint = "" if self._verbose else "; --verbose shows how far they are"
        self._say(f"loading the towers ({self._config.cell.placement}) of {self._config.model.checkpoint}{hint}")

    def _check_joined(self, address: str) -> None:
        if not self._replace:
            deployment.check_free(address)
        if not local_ray.serve_runs():
            self._check_ports()

    @property
    def _ports(self) -> dict[str, int]:
        ingress = self._config.ingress
        return {"http_port": ingress.http_port, "grpc_port": ingress.grpc_port}

    def _check_ports(self) -> None:
        ports.check_free(self._config.ingress.host, **self._ports)

    def _check_room(self) -> None:
        """What does not fit waits silently, for ever. Another's cluster may grow; ours is what this machine has."""
        lacking = deployment.shortage(self._config)
        if lacking is None:
            return
        if self._address is None:
            raise ConfigError(f"cell: {lacking}; wanted cells that fit, such as --set cell.device=cpu")
        self._say(f"waiting for the cluster to grow: {lacking}")

    def _wait_until_ready(self) -> None:
        told = Progress(0, 0)
        limit_s = self._config.cell.start_timeout_s + _START_SLACK_S
        deadline = time.monotonic() + limit_s
        while True:
            now = self._progress(told)
            if now.failure is not None:
                raise now.failure
            self._tell(now, told)
            told = now
            if now.routers and now.cells and is_ready(self._state.http):
                self._state = replace(self._state, cells=now.cells)
                return
            if time.monotonic() > deadline:
                raise Unavailable(f"not ready within {limit_s:g} s: {self._lacking(now)}")
            time.sleep(_POLL_S)

    def _tell(self, now: Progress, told: Progress) -> None:
        if now.routers > told.routers:
            self._say(f"{now.routers} of {self._config.cluster.num_routers} routers running")
        if now.cells > told.cells:
            self._say(f"{now.cells} of {self._config.cluster.min_cells} cells running")

    def _lacking(self, now: Progress) -> str:
        cluster = self._config.cluster
        if now.routers and now.cells:
            return f"routers and cells run, but http://{self._state.http}/ready does not say so"
        running = f"{now.routers} of {cluster.num_routers} routers and {now.cells} of {cluster.min_cells} cells running"
        lacking = deployment.shortage(self._config)
        return running if lacking is None else f"{running}; {lacking}"

    def _progress(self, last: Progress) -> Progress:
        """Where the application stands; the `last` known while Serve is silent. Raises Unavailable if it stays so, or
        the application is gone."""
        try:
            now = deployment.progress(self._mark)
        except Unavailable:
            if time.monotonic() - self._heard > _SILENCE_S:
                raise
            return last
        self._heard = time.monotonic()
        if now.lost is not None:
            raise Unavailable(f"the application is not this service's any more: {now.lost}")
        return now

    def _watch(self) -> None:
        """Until interrupted; tells when cells come and go."""
        while True:
            time.sleep(_WATCH_S)
            cells = self._progress(Progress(0, self._state.cells)).cells
            if cells != self._state.cells:
                self._say(f"{cells} cells running")
                self._state = replace(self._state, cells=cells)
                run_state.write(self._config.ingress.http_port, self._state)

    def _check_model(self) -> None:
        """What the towers and routers would find wrong with settings and checkpoint, before any of them starts.

        Whatever it is, it is a wrong setting. Raises ConfigError.
        """
        local_ray.prepare_environment()
        try:
            served_paths.check_directory(self._config.model.checkpoint)
            deployment.check(self._config)
        except CheckpointError as error:
            raise ConfigError(f"model.checkpoint: {error}") from error

    def _first_state(self) -> RunState:
        ingress, me = self._config.ingress, psutil.Process()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(ingress.host, ingress.host)
        host = f"[{host}]" if ":" in host else host
        http, grpc = f"{host}:{ingress.http_port}", f"{host}:{ingress.grpc_port}"
        return RunState(os.getpid(), me.create_time(), http, grpc, self._config.model.checkpoint)

    def _say(self, what: str) -> None:
        print(f"[{time.monotonic() - self._began:5.1f} s] {what}", file=sys.stderr, flush=True)


def _listen_to_signals() -> None:
    """Both mean: stop in good order. A script's background job would otherwise ignore SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _what_next(state: RunState, prompt: str | list[int]) -> str:
    text = isinstance(prompt, str)
    shell = f"--prompt $'{json.dumps(prompt)[1:-1]}'" if text else f"--prompt-token-ids {','.join(map(str, prompt))}"
    return f"""
The service answers on http://{state.http} (OpenAI's API) and {state.grpc} (gRPC). In another terminal, try:

  curl http://{state.http}/v1/completions -H 'content-type: application/json' \\
    -d '{json.dumps({"prompt": prompt, "max_tokens": 64})}'
  {command(f"generate {shell}")}

Ctrl-C stops it."""
