"""Who asks: what is kept fair between callers knows them by this name."""

from typing import Any, NewType

from starlette.requests import Request

Caller = NewType("Caller", str)
NOBODY = Caller("")


def of_http(request: Request) -> Caller:
    """Its address. Of a gateway's requests the proxy finds the clients' own where FORWARDED_ALLOW_IPS names it.

    Not the `user` of a body: whoever floods would write a new one on every request.
    """
    return Caller(request.client.host) if request.client else NOBODY


def of_grpc(context: Any) -> Caller:
    """Its address, of a peer such as ipv4:127.0.0.1:4711 or ipv6:[::1]:4711."""
    family, _, rest = str(context.peer() or "").partition(":")
    if family not in ("ipv4", "ipv6"):
        return NOBODY
    return Caller(rest.rpartition(":")[0].strip("[]"))
