"""The note a running `up` leaves for `status`, `down` and `generate`: one small file per HTTP port and user."""

import contextlib
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.ops.invocation import command
from twotower.errors import ConfigError

_POLL_S = 0.1
_START = 19  # index among the fields of /proc/PID/stat after the name


@dataclass(frozen=True, slots=True)
class RunState:
    """Where an `up` of this user serves, or will serve.

    `started` is its process's `start_tick`, so that a reused pid is noticed.
    """

    pid: int
    started: int
    http: str
    grpc: str
    model: str
    cells: int = 0
    drain_timeout_s: float = 600.0  # missing in a note of an older version
    joined: str | None = None  # the address of a Ray that is not its own
    session: str | None = None  # the directory of its own Ray's session, once there is one
    cert_file: str | None = None  # the certificate of its faces; without one they do not speak TLS

    @property
    def url(self) -> str:
        """The URL of HTTP."""
        return f"{'http' if self.cert_file is None else 'https'}://{self.http}"

    def is_alive(self) -> bool:
        """Whether that very process still runs."""
        try:
            process = psutil.Process(self.pid)
            same = start_tick(self.pid) == self.started and process.uids().real == os.getuid()
            return same and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return False

    def ends_within(self, seconds: float) -> bool:
        """Waits at most so many seconds for that process's end. Returns whether it has ended."""
        deadline = time.monotonic() + seconds
        while self.is_alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


def start_tick(pid: int) -> int:
    """When the process began, in the kernel's ticks since boot, which do not depend on the clock. Raises
    FileNotFoundError or ProcessLookupError if there is no such process.
    """
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    return int(after_name.split()[_START])


def directory() -> Path:
    """This user's directory for such notes, made if missing. Raises ConfigError if it cannot be used."""
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


def remove(http_port: int, pid: int) -> None:
    """Removes this process's note; a newer note in its place stays."""
    file = file_of(http_port)
    with contextlib.suppress(ValueError, TypeError, FileNotFoundError):
        if _read(file).pid == pid:
            file.unlink()


def _read(file: Path) -> RunState:
    return RunState(**json.loads(file.read_text()))


def running() -> dict[int, RunState]:
    """Services of this user that are alive, starting ones included, by HTTP port."""
    return {port: state for port, state in _notes().items() if state.is_alive()}


def killed() -> dict[int, RunState]:
    """Services whose process has ended without removing its note, by HTTP port."""
    return {port: state for port, state in _notes().items() if not state.is_alive()}


def _notes() -> dict[int, RunState]:
    found = {}
    for file in sorted(directory().glob("service-*.json")):
        port = int(file.stem.removeprefix("service-"))
        with contextlib.suppress(ValueError, TypeError, FileNotFoundError):
            found[port] = _read(file)
    return found


def the_one(http_port: int | None) -> tuple[int, RunState]:
    """The service on this port, or the only one. Raises ConfigError if there is none, or if there are several."""
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
    """The gRPC address of the only running service; else the default."""
    services = running()
    return next(iter(services.values())).grpc if len(services) == 1 else "127.0.0.1:50051"
