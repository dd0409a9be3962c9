"""Hosts without machines: network namespaces on a switch of their own, with no way out, and pods that run in them.

A pod is what a container runtime makes: its own network, processes, `/tmp/ray` and `/dev/shm`. Knows nothing of Ray.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

_PREFIX = "twotower"
_SUBNET = "10.99.0"  # seen inside only
_LOST = re.compile(rf"{_PREFIX}-(\d+)-\S+")
PROGRAMS = ("ip", "unshare", "setpriv", "curl", "wget")
_END_S = 10.0


class Network:
    """A switch, and one namespace for each host joined to it. `close` it, whatever happens."""

    def __init__(self) -> None:
        self._name = f"{_PREFIX}-{os.getpid()}"
        self._switch = f"{self._name}-switch"
        self._joined: dict[str, str] = {}  # port of the switch by namespace
        self._numbers = 0
        _clear_what_is_lost()
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")

    def join(self, host: str) -> tuple[str, str]:
        """A namespace for this host, and its address, which no host has had before."""
        self._numbers += 1
        space, port, address = f"{self._name}-{host}", f"port{self._numbers}", f"{_SUBNET}.{self._numbers}"
        _ip("netns", "add", space)
        self._joined[space] = port
        _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", space, "link", "set", link, "up")
        return space, address

    def cut(self, space: str) -> None:
        """Nothing reaches this host or leaves it. Its connections do not hear of it."""
        _ip("-n", self._switch, "link", "set", self._joined[space], "down")

    def heal(self, space: str) -> None:
        _ip("-n", self._switch, "link", "set", self._joined[space], "up")

    def leave(self, space: str) -> None:
        del self._joined[space]
        _ip("netns", "del", space)

    def close(self) -> None:
        for space in list(self._joined):
            self.leave(space)
        _ip("netns", "del", self._switch)


class Pod:
    """A command as the first process of a container that can see only itself. Ends with the process that made it."""

    def __init__(
        self, network: Network, name: str, directory: Path, shared_memory: str, environment: Mapping[str, str]
    ) -> None:
        self.name, self._network, self._environment = name, network, dict(environment)
        self.space, self.address = network.join(name)
        self._directory, self._shared_memory = directory, shared_memory
        self.ray = directory / "ray"
        self.ray.mkdir(parents=True)
        self._runtime: subprocess.Popen[bytes] | None = None
        self._command, self._starts = "", 0

    def start(self, command: str) -> None:
        """By bash, as the container's entry point. Not from a thread that ends before the pod shall."""
        self._command = command
        self._starts += 1
        mounts = (
            f"mkdir -p /tmp/ray && mount --bind {shlex.quote(str(self.ray))} /tmp/ray"
            f" && mount -t tmpfs -o size={self._shared_memory} none /dev/shm"
        )
        isolated = "unshare --mount --pid --fork --kill-child --mount-proc --propagation private".split()
        entry = ["bash", "-c", f'{mounts} && exec bash -c "$0"', command]
        with self._log.open("wb") as log:
            self._runtime = subprocess.Popen(
                inside(self.space, ["setpriv", "--pdeathsig", "KILL", *isolated, *entry]),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_again(self) -> None:
        """As the kubelet does with a container that has ended: in the same pod, at the same address."""
        assert self.has_ended, f"{self.name} still runs"
        self.start(self._command)

    def run(self, command: Sequence[str], within_s: float) -> bool:
        """Whether this command succeeds within so many seconds on the pod's network, as a probe's does."""
        try:
            ran = subprocess.run(
                inside(self.space, command), env=self._environment, capture_output=True, timeout=within_s
            )
        except subprocess.TimeoutExpired:
            return False
        return ran.returncode == 0

    def terminate(self) -> None:
        """SIGTERM for the first process."""
        assert self._runtime is not None
        [first] = psutil.Process(self._runtime.pid).children()
        first.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL for all of its processes at once: the first one of a namespace takes the others with it."""
        if self._runtime is not None:
            first = psutil.Process(self._runtime.pid).children() if not self.has_ended else []
            self._runtime.kill()
            self._runtime.wait(_END_S)
            psutil.wait_procs(first, _END_S)

    def processes(self, title: str) -> list[psutil.Process]:
        """Those that call themselves so, as Ray's do."""
        assert self._runtime is not None
        found = []
        for process in psutil.Process(self._runtime.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "".join(process.cmdline()[:1]).startswith(title):
                    found.append(process)
        return found

    @property
    def has_ended(self) -> bool:
        return self._runtime is None or self._runtime.poll() is not None

    def remove(self) -> None:
        """The end of it, at once."""
        self.kill()
        self._network.leave(self.space)

    def said(self, last: int = 3000) -> str:
        """Since it was started last."""
        log = self._log
        return f"{self.name}: " + (log.read_text(errors="replace")[-last:] if log.exists() else "not started")

    @property
    def _log(self) -> Path:
        return self._directory / ("log" if self._starts < 2 else f"log-{self._starts}")


def inside(space: str, command: Sequence[str]) -> list[str]:
    return ["ip", "netns", "exec", space, *command]


def why_not() -> str | None:
    """Why no pods can be had here; None where they can."""
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        return f"{', '.join(missing)} not installed"
    name = f"{_PREFIX}-{os.getpid()}-trial"
    trial = "unshare --mount --pid --fork --mount-proc mount -t tmpfs none /dev/shm".split()
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "br0", "type", "bridge")
            _run(inside(name, ["setpriv", "--pdeathsig", "KILL", *trial]))
        finally:
            _ip("netns", "del", name)
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def _clear_what_is_lost() -> None:
    """Namespaces of runs that were killed. Their pods have died with them."""
    for line in _ip("netns", "list").splitlines():
        found = _LOST.match(line)
        if found is not None and not psutil.pid_exists(int(found[1])):
            with suppress(RuntimeError):  # another run has cleared it
                _ip("netns", "del", found[0])


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: Sequence[str]) -> str:
    """Raises RuntimeError with what it said."""
    ran = subprocess.run(command, capture_output=True, text=True, timeout=_END_S)
    if ran.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {ran.stderr.strip()}")
    return ran.stdout
