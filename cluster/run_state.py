"""The note a running `up` leaves for `status`, `down` and `generate`: one small file per HTTP port and user."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.invocation import command
from twotower.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RunState:
    """Where an `up` of this user serves. `started` is its process's start time, so that a reused pid is noticed."""

    pid: int
    started: float
    http: str
    grpc: str
    model: str
    cells: int = 0

    def is_alive(self) -> bool:
        """Whether that very process still runs."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started and process.uids().real == os.getuid()
        except psutil.NoSuchProcess:
            return False


def directory() -> Path:
    """This user's own directory for such notes, made where it is missing. Raises ConfigError if it cannot be used."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(runtime) / "twotower" if runtime else Path(tempfile.gettempdir()) / f"twotower-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be made ({error.strerror}); set XDG_RUNTIME_DIR to a directory of yours"
        ) from None
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ConfigError(f"{path}: belongs to someone else; set XDG_RUNTIME_DIR to a directory of yours")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: cannot be written to; set XDG_RUNTIME_DIR to a directory of yours")
    return path


def file_of(http_port: int) -> Path:
    return directory() / f"service-{http_port}.json"


def write(http_port: int, state: RunState) -> None:
    """Replaces the note as a whole."""
    file = file_of(http_port)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(state)))
    partial.replace(file)


def remove(http_port: int) -> None:
    file_of(http_port).unlink(missing_ok=True)


def running() -> dict[int, RunState]:
    """Services of this user that are alive, by HTTP port. Notes of dead ones are cleared away."""
    found = {}
    for file in sorted(directory().glob("service-*.json")):
        port = int(file.stem.removeprefix("service-"))
        try:
            state = RunState(**json.loads(file.read_text()))
        except (ValueError, TypeError, FileNotFoundError):
            continue
        if state.is_alive():
            found[port] = state
        else:
            file.unlink(missing_ok=True)
    return found


def the_one(http_port: int | None) -> tuple[int, RunState]:
    """The service on this port, or the only one there is. Raises ConfigError where that is none or several."""
    services = running()
    if http_port is not None:
        if http_port not in services:
            raise ConfigError(f"no service of yours listens on HTTP port {http_port}")
        return http_port, services[http_port]
    if not services:
        raise ConfigError(f"no service of yours is running; start one with: {command('up')}")
    if len(services) > 1:
        raise ConfigError(f"several services are running; choose one with --http-port: {', '.join(map(str, services))}")
    return next(iter(services.items()))


def grpc_address() -> str:
    """The running service's, if there is just one; else the default."""
    services = running()
    return next(iter(services.values())).grpc if len(services) == 1 else "127.0.0.1:50051"
