"""The service's two ports: checks that they are free, and reserves them for one `up` of this machine.

Serve and gRPC let several processes listen on one port (SO_REUSEPORT): the kernel would let a second service answer the
first one's clients.
"""

import contextlib
import os
import socket
from collections.abc import Iterator

from cluster.ops import run_state
from twotower.errors import ConfigError, TwoTowerError
from twotower.showing import show


class PortTaken(TwoTowerError):
    """Another process listens on a port of the service, or is about to."""


@contextlib.contextmanager
def held(**by_setting: int) -> Iterator[None]:
    """Keeps every other `up` from these ports before anything listens on them. Raises PortTaken."""
    with contextlib.ExitStack() as locks:
        for setting, port in by_setting.items():
            lock = locks.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            try:
                # An abstract socket name is visible where the port is, for all users, and ends with this process.
                lock.bind(f"\0twotower-port-{port}")
            except OSError:
                raise _taken(setting, str(port), "another `up` uses it", by_setting) from None
        yield


def check_free(host: str, **by_setting: int) -> None:
    """Raises PortTaken where one of the ports is in use."""
    for setting, port in by_setting.items():
        try:
            _try_to_listen(host, port)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise _taken(setting, f"{host}:{port}", reason, by_setting) from None


def _taken(setting: str, where: str, reason: str, by_setting: dict[str, int]) -> PortTaken:
    services = run_state.running()
    other = next((service for port, service in services.items() if port in by_setting.values()), None)
    whose = f" (taken by your service, pid {other.pid})" if other else ""
    return PortTaken(
        f"ingress.{setting}: cannot listen on {where}{whose}: {reason}; "
        f"choose another with --set ingress.{setting}=PORT"
    )


def check_host(host: str) -> None:
    """Raises ConfigError unless a process can listen on this host, on any port."""
    try:
        _try_to_listen(host, 0)
    except (OSError, UnicodeError) as error:
        told = isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno
        reason = os.strerror(told) if told else "no such name"
        raise ConfigError(
            f"ingress.host: got {show(host)}, wanted an address of this machine, such as 127.0.0.1, 0.0.0.0 or ::1 "
            f"({reason})"
        ) from None


def _try_to_listen(host: str, port: int) -> None:
    """Listens as Serve does: IPv6 for an address with colons, IPv4 for any other address and for names."""
    wanted = socket.AF_INET6 if ":" in host else socket.AF_INET
    family, *_, address = socket.getaddrinfo(host, port, wanted, socket.SOCK_STREAM)[0]
    with socket.create_server(address[:2], family=family):
        pass
