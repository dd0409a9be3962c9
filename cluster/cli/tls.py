"""How our commands connect to a service: plain or with TLS, and which certificates they trust.

A service of this user is verified by the certificate in its note, whatever the certificate's name. Any other service is
verified by three environment variables.
"""

import os
import ssl
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import certificates
from cluster.ops import run_state
from cluster.ops.run_state import RunState
from twotower.errors import ConfigError
from twotower_client import Tls

CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE = "TWOTOWER_TLS_CA", "TWOTOWER_TLS_CERT", "TWOTOWER_TLS_KEY"


@dataclass(frozen=True, slots=True)
class Trust:
    """`roots`: certificates in PEM. `name`: a name of the single certificate in `roots`, if exactly that one is
    expected.
    """

    roots: bytes
    name: str | None = None

    @property
    def context(self) -> ssl.SSLContext:
        """The TLS context for HTTP."""
        context = ssl.create_default_context(cadata=self.roots.decode())
        if self.name is not None:
            context.check_hostname = False
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context


def trust_for(address: str) -> Trust | None:
    """None: no TLS. Raises ConfigError for files that cannot be read."""
    for state in _own_services():
        if address in (state.http, state.grpc):
            _check_own()
            return None if state.cert_file is None else Trust(*certificates.leaf(Path(state.cert_file)))
    roots = _file(CA_VARIABLE)
    if roots is None:
        return None
    try:
        ssl.create_default_context(cadata=roots.decode())
    except (ValueError, ssl.SSLError):
        raise ConfigError(f"{CA_VARIABLE}: {os.environ[CA_VARIABLE]}: wanted certificates in PEM") from None
    _check_own()
    return Trust(roots)


def url(address: str) -> str:
    """The URL of HTTP."""
    return f"{'http' if trust_for(address) is None else 'https'}://{address}"


def opened(request: urllib.request.Request, address: str, timeout_s: float) -> Any:
    """The answer, without the environment's proxies."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if (trust := trust_for(address)) is not None:
        handlers.append(urllib.request.HTTPSHandler(context=trust.context))
    return urllib.request.build_opener(*handlers).open(request, timeout=timeout_s)


def probed(url: str, timeout_s: float) -> Any:
    """The answer of `/ready`, which has no secrets: like a probe of Kubernetes, this accepts any certificate."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if url.startswith("https:"):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        handlers.append(urllib.request.HTTPSHandler(context=context))
    return urllib.request.build_opener(*handlers).open(url, timeout=timeout_s)


def grpc_target(address: str) -> tuple[str, Tls | None]:
    """URL and TLS for the client. Raises ConfigError."""
    trust = trust_for(address)
    if trust is None:
        return f"grpc://{address}", None
    own = os.environ.get(CERT_VARIABLE) or None, os.environ.get(KEY_VARIABLE) or None
    return f"grpcs://{address}", Tls(trust.roots, *own, server_name=trust.name)


def _own_services() -> Iterable[RunState]:
    """This user's services; none if the user has no directory for notes."""
    try:
        return run_state.running().values()
    except ConfigError:
        return ()


def _check_own() -> None:
    """The files that a service with `grpc_client_ca_file` wants."""
    if (_file(CERT_VARIABLE) is None) != (_file(KEY_VARIABLE) is None):
        raise ConfigError(f"{CERT_VARIABLE} and {KEY_VARIABLE}: got one of them, wanted both or none")


def _file(variable: str) -> bytes | None:
    path = os.environ.get(variable)
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{variable}: {path}: cannot be read: {error.strerror}") from None
