"""The bench's end of those who may not: what they get, what they should get, and the certificates that they see."""

import json
import subprocess
import sys

from benchmarks.pods_parts.faces import ACCESS
from benchmarks.pods_parts.network import inside
from benchmarks.pods_parts.secrets import SERVICE
from benchmarks.pods_parts.site import Site, environment
from benchmarks.pods_parts.stranger import NOTHING

_ALL_S = 60.0
WANTED = {
    "HTTP, its health": "200",
    "HTTP, no key": "401 invalid_api_key",
    "HTTP, unknown key": "401 invalid_api_key",
    "HTTP, operators' page": "401 invalid_api_key",
    "HTTP, no TLS": NOTHING,
    "gRPC, no key": "UNAUTHENTICATED",
    "gRPC, unknown key": "UNAUTHENTICATED",
    "gRPC, no certificate": NOTHING,
    "gRPC, another authority's certificate": NOTHING,
    "gRPC, no TLS": NOTHING,
}


def told(where: Site, host: str, name: str = SERVICE) -> dict[str, str]:
    """What strangers get there, by what they lack. Raises RuntimeError where that cannot be said."""
    return _asked(where, host, name, "refused")


def shown(where: Site, host: str, name: str = SERVICE) -> dict[str, str]:
    """The fingerprint of the certificate that each face shows to new connections."""
    return _asked(where, host, name, "certificates")


def _asked(where: Site, *arguments: str) -> dict[str, str]:
    given = environment(where.directory) | {ACCESS: where.secrets.access().written()}
    command = inside(where.client, [sys.executable, "-m", "benchmarks.pods_parts.stranger", *arguments])
    ran = subprocess.run(command, env=given, capture_output=True, text=True, timeout=_ALL_S)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {ran.stderr[-2000:]}")
    return dict(json.loads(ran.stdout))
