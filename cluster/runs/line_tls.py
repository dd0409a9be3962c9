"""TLS of the lines between cells and routers, which leave the node: with Ray's own files, if Ray speaks TLS.

So one switch (RAY_USE_TLS) covers all traffic between a cluster's processes. As in Ray, both ends show a certificate,
and the called end's certificate must have its address. Files are read when a process starts.
"""

import os
import ssl
from collections.abc import Mapping

from twotower.errors import ConfigError

SWITCH = "RAY_USE_TLS"
FILES = CERT, KEY, CA = "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"


def listening(environment: Mapping[str, str] = os.environ) -> ssl.SSLContext | None:
    """The context of the called end; None if Ray does not speak TLS. Raises ConfigError."""
    return _context(ssl.PROTOCOL_TLS_SERVER, environment)


def connecting(environment: Mapping[str, str] = os.environ) -> ssl.SSLContext | None:
    """The context of the calling end; None if Ray does not speak TLS. Raises ConfigError."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, environment)


def _context(protocol: int, environment: Mapping[str, str]) -> ssl.SSLContext | None:
    if environment.get(SWITCH, "0").lower() not in ("1", "true"):
        return None
    missing = [name for name in FILES if not environment.get(name)]
    if missing:
        raise ConfigError(f"{SWITCH}: got it without {', '.join(missing)}")
    context = ssl.SSLContext(protocol)
    try:
        context.load_cert_chain(environment[CERT], environment[KEY], password=_no_password)
        context.load_verify_locations(environment[CA])
    except (OSError, ssl.SSLError) as error:  # the second is of the first's kind, which does not name the file
        raise ConfigError(f"{SWITCH}: the files of {', '.join(FILES)} cannot be used: {error}") from None
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _no_password() -> str:
    """Called for an encrypted key. Without it OpenSSL would ask the terminal."""
    raise ConfigError(f"{KEY}: is encrypted; wanted a key without a password")
