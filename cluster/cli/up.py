"""`python -m cluster up`: from a configuration to a service that answers, and down again without a trace."""

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

from cluster import certificates, served_paths
from cluster.cli.asking import is_ready
from cluster.config import ServiceConfig
from cluster.ops import deployment, draining, left_behind, local_ray, ports, run_state, scraping
from cluster.ops.deployment import Progress
from cluster.ops.invocation import command
from cluster.ops.run_state import RunState
from twotower.errors import CheckpointError, ConfigError, Unavailable
from twotower.showing import one_line

_POLL_S = 0.25
_WATCH_S = 2.0
_START_SLACK_S = 60.0  # seconds beyond the towers' loading time
_SILENCE_S = 30.0  # Serve may be without a controller for so long; Ray restarts it


class Up:
    """One run of `up`."""

    def __init__(self, config: ServiceConfig, address: str | None, verbose: bool, replace: bool = False) -> None:
        self._config, self._address, self._verbose, self._replace = config, address, verbose, replace
        self._mark: bytes | None = None
        self._locks = contextlib.ExitStack()
        self._began = self._heard = time.monotonic()
        self._state = self._first_state()

    def run(self) -> None:
        """Serves until SIGINT or SIGTERM. Raises a TwoTowerError if it never came up, or lost its application."""
        ports.check_host(self._config.ingress.host)
        run_state.directory()
        with self._locks:
            if not self._replace:
                self._locks.enter_context(ports.held(**self._ports))
            self._clear_what_was_killed()
            if self._address is None:
                self._check_ports()
            _listen_to_signals()
            self._check_model()
            self._serve()
        self._say("stopped")

    def _serve(self) -> None:
        """The note is always removed last: the next `up` finds a killed `up` by its note."""
        with contextlib.ExitStack() as ending:
            ending.callback(run_state.remove, self._config.ingress.http_port, self._state.pid)
            if self._address is None:
                self._note()
                self._tell_guard = ending.enter_context(left_behind.guarded(self._state))
            ending.callback(self._take_down)
            try:
                self._start()
                self._wait_until_ready()
                self._note()
                self._say("ready")
                prompt = served_paths.example_prompt(self._config.model.checkpoint)
                keys = self._config.ingress.keys_file is not None
                print(_what_next(self._state, prompt, scraping.targets(), keys), flush=True)
                self._watch()
            except KeyboardInterrupt:
                draining.drain(self._mark, self._config.cluster.drain_timeout_s, self._say)

    def _take_down(self) -> None:
        with _undisturbed():
            deployment.take_down(self._mark)

    def _clear_what_was_killed(self) -> None:
        for port, state in run_state.killed().items():
            titles = left_behind.end_processes(state)
            run_state.remove(port, state.pid)
            ended = "process" if len(titles) == 1 else "processes"
            cleared = f"its note, {len(titles)} {ended} ({', '.join(titles)})" if titles else "its note"
            self._say(f"the `up` on {state.url} (pid {state.pid}) was killed; cleared: {one_line(cleared)}")
            if state.joined is not None:
                self._say(
                    f"its application may still run on the Ray at {state.joined}; --address with --replace ends it"
                )

    def _start(self) -> None:
        self._say("starting Ray" if self._address is None else f"joining the Ray at {self._address}")
        told = local_ray.session_told(self._note_session) if self._address is None else contextlib.nullcontext()
        with told:
            local_ray.start_ray(self._address, show_worker_logs=self._verbose)
        _listen_to_signals()  # Ray has put its own there
        if self._address is not None:
            self._check_joined(self._address)
        choice = deployment.choice(self._config)
        self._config = choice.config
        self._say(choice.why)
        self._check_room()
        self._say("starting Serve")
        local_ray.start_serve(self._config.ingress)
        self._take_place()
        deployment.deploy(self._config)
        self._heard = time.monotonic()
        hint = "" if self._verbose else "; --verbose shows how far they are"
        self._say(f"loading the towers ({self._config.cell.placement}) of {self._config.model.checkpoint}{hint}")

    def _take_place(self) -> None:
        """From now on the application's place on this Ray is ours. An application that runs there is ended."""
        from cluster.ops import ownership  # which imports Ray

        self._mark = ownership.new_mark(own_ray=self._address is None)
        deployment.take(self._mark, self._address or "this machine", self._replace)
        if self._replace:
            self._say("ending the running application")
            limit_s = self._config.cluster.drain_timeout_s
            draining.finish(self._mark, limit_s, self._say)
            deployment.clear_place(limit_s + _START_SLACK_S)

    def _check_joined(self, address: str) -> None:
        """If Serve runs, its ports belong to the application to replace. Otherwise the ports must be free."""
        if not self._replace:
            deployment.check_free(address)
        if not local_ray.serve_runs():
            if self._replace:
                self._locks.enter_context(ports.held(**self._ports))
            self._check_ports()

    @property
    def _ports(self) -> dict[str, int]:
        ingress = self._config.ingress
        return {"http_port": ingress.http_port, "grpc_port": ingress.grpc_port}

    def _check_ports(self) -> None:
        ports.check_free(self._config.ingress.host, **self._ports)

    def _check_room(self) -> None:
        """A cell that does not fit would wait silently for ever. A joined cluster may grow; our own Ray has one
        machine.
        """
        lacking = deployment.shortage(self._config)
        if lacking is None:
            return
        if self._address is None:
            raise ConfigError(f"cell: {lacking}; wanted cells that fit, such as --set cell.device=cpu")
        self._say(f"waiting for the cluster to grow: {lacking}")

    def _wait_until_ready(self) -> None:
        told = Progress(0, 0)
        limit_s = self._config.engine.start_timeout_s + _START_SLACK_S
        deadline = time.monotonic() + limit_s
        while True:
            now = self._progress(told)
            if now.failure is not None:
                raise now.failure
            self._tell(now, told)
            told = now
            if now.routers and now.cells and is_ready(self._state.http, over_tls=self._state.cert_file is not None):
                self._state = replace(self._state, cells=now.cells)
                return
            if time.monotonic() > deadline:
                raise Unavailable(f"not ready within {limit_s:g} s: {self._lacking(now)}")
            time.sleep(_POLL_S)

    def _tell(self, now: Progress, told: Progress) -> None:
        if now.routers > told.routers:
            self._say(f"{now.routers} of {self._config.cluster.routers} routers running")
        if now.cells > told.cells:
            self._say(f"{now.cells} of {self._config.cluster.min_cells} cells running")

    def _lacking(self, now: Progress) -> str:
        cluster = self._config.cluster
        if now.routers and now.cells:
            return f"routers and cells run, but {self._state.url}/ready does not say so"
        running = f"{now.routers} of {cluster.routers} routers and {now.cells} of {cluster.min_cells} cells running"
        lacking = deployment.shortage(self._config)
        return running if lacking is None else f"{running}; {lacking}"

    def _progress(self, last: Progress) -> Progress:
        """The application's progress; while Serve does not answer, the `last` known one. Raises Unavailable if Serve
        stays silent, or if the application is gone.
        """
        try:
            now = deployment.progress(self._mark)
        except Unavailable:
            if time.monotonic() - self._heard > _SILENCE_S:
                raise
            return last
        self._heard = time.monotonic()
        if now.lost is not None:
            raise Unavailable(f"this `up` has lost its application: {now.lost}")
        return now

    def _watch(self) -> None:
        """Watch until interrupted, and print when cells start and end."""
        while True:
            time.sleep(_WATCH_S)
            cells = self._progress(Progress(0, self._state.cells)).cells
            if cells != self._state.cells:
                self._say(f"{cells} cells running")
                self._state = replace(self._state, cells=cells)
                self._note()

    def _check_model(self) -> None:
        """Finds errors in settings and checkpoint that towers and routers would find, before any of them starts.

        Each such fault is a wrong setting. Raises ConfigError.
        """
        local_ray.prepare_environment()
        try:
            served_paths.check_directory(self._config.model.checkpoint)
            deployment.check(self._config)
        except CheckpointError as error:
            raise ConfigError(f"model.checkpoint: {error}") from error

    def _first_state(self) -> RunState:
        ingress, pid = self._config.ingress, os.getpid()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(ingress.host, ingress.host)
        host = f"[{host}]" if ":" in host else host
        http, grpc = f"{host}:{ingress.http_port}", f"{host}:{ingress.grpc_port}"
        drain_timeout_s, model = self._config.cluster.drain_timeout_s, self._config.model.checkpoint
        started = run_state.start_tick(pid)
        return RunState(
            pid, started, http, grpc, model, 0, drain_timeout_s, self._address, cert_file=ingress.tls_cert_file
        )

    def _note_session(self, session: str) -> None:
        """If this process is killed from now on, its guard or the next `up` finds the processes of its Ray."""
        self._tell_guard(session)
        self._state = replace(self._state, session=session)
        self._note()

    def _note(self) -> None:
        run_state.write(self._config.ingress.http_port, self._state)

    def _say(self, what: str) -> None:
        print(f"[{time.monotonic() - self._began:5.1f} s] {what}", file=sys.stderr, flush=True)


def _listen_to_signals() -> None:
    """Both signals stop the service after its running requests. Without this, a script's background job would ignore
    SIGINT.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals are ignored meanwhile: an end that takes seconds must not stop halfway."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _curled(state: RunState) -> str:
    """The service's URL for curl, which verifies the certificate by its file, whatever the certificate's name."""
    if state.cert_file is None:
        return state.url
    file, (_, name) = Path(state.cert_file), certificates.leaf(Path(state.cert_file))
    return f"--cacert {shlex.quote(str(file))} --connect-to ::{state.http} https://{name}"


def _what_next(state: RunState, prompt: str | list[int], targets: list[str], keys: bool) -> str:
    key = ' -H "authorization: Bearer $TWOTOWER_API_KEY"' if keys else ""
    wanted = "\n`generate`, `status` and `tune` take the service's key from TWOTOWER_API_KEY." if keys else ""
    scraped = "".join(f"\nMetrics for Prometheus: http://{target}/metrics" for target in targets)
    text = isinstance(prompt, str)
    shell = f"--prompt $'{json.dumps(prompt)[1:-1]}'" if text else f"--prompt-token-ids {','.join(map(str, prompt))}"
    return f"""
The service answers on {state.url} (OpenAI's API) and {state.grpc} (gRPC). In another terminal, try:

  curl {_curled(state)}/v1/completions -H 'content-type: application/json'{key} \\
    -d '{json.dumps({"prompt": prompt, "max_tokens": 64})}'
  {command(f"generate {shell}")}
{wanted}{scraped}
Ctrl-C stops it."""
