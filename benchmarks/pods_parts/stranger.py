"""One who may not: what a service of keys and TLS tells him, and the certificates that it shows.

`python -m benchmarks.pods_parts.stranger HOST NAME WHAT` asks from the namespace that it runs in, and writes a JSON
object. What it needs of a client's own is in its environment (`ACCESS`).
"""

import hashlib
import json
import os
import socket
import ssl
import sys
from collections.abc import Callable
from dataclasses import replace
from http.client import HTTPConnection

import grpc

from benchmarks.chaos_parts.access import Access
from benchmarks.pods_parts.certificates import signed
from benchmarks.pods_parts.faces import ACCESS, GRPC_PORT, HTTP_PORT
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

_WITHIN_S = 10.0
_UNKNOWN = "tt-" + "A" * 43
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
_ALERT = b"\x15\x03"  # TLS says that it ends
NOTHING = "nothing"


def refused(host: str, access: Access) -> dict[str, str]:
    """What one gets, by what one lacks."""
    stranger = replace(access, key=_UNKNOWN)
    without = replace(access, tls=replace(access.tls, certificate=None, key=None))
    return {
        "HTTP, its health": _http(host, access, "/health"),
        "HTTP, no key": _http(host, access, "/v1/models"),
        "HTTP, unknown key": _http(host, access, "/v1/models", stranger.headers),
        "HTTP, operators' page": _http(host, access, "/ops"),
        "HTTP, no TLS": _plain(host, HTTP_PORT, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"),
        "gRPC, no key": _grpc(host, access, grpc.ssl_channel_credentials(*access.tls.read())),
        "gRPC, unknown key": _grpc(host, access, stranger.channel),
        "gRPC, no certificate": _grpc(host, access, without.channel),
        "gRPC, another authority's certificate": _grpc(host, access, _self_signed(access)),
        "gRPC, no TLS": _plain(host, GRPC_PORT, _PREFACE),
    }


def certificates(host: str, access: Access) -> dict[str, str]:
    """The fingerprint of what each face shows now to a client who believes the service's authority."""
    return {"http": _shown(host, HTTP_PORT, access, []), "grpc": _shown(host, GRPC_PORT, access, ["h2"])}


def _http(host: str, access: Access, path: str, headers: dict[str, str] | None = None) -> str:
    connection = HTTPConnection(host, HTTP_PORT, timeout=_WITHIN_S)
    connection.sock = _secure(host, HTTP_PORT, access, [])
    try:
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        body = answer.read()
        code = json.loads(body)["error"]["code"] if answer.status != 200 else ""
        return f"{answer.status} {code}".strip()
    finally:
        connection.close()


def _secure(host: str, port: int, access: Access, protocols: list[str]) -> ssl.SSLSocket:
    context = access.tls.context()
    if protocols:
        context.set_alpn_protocols(protocols)
    opened = socket.create_connection((host, port), _WITHIN_S)
    return context.wrap_socket(opened, server_hostname=access.tls.server_name)


def _shown(host: str, port: int, access: Access, protocols: list[str]) -> str:
    with _secure(host, port, access, protocols) as connection:
        return hashlib.sha256(connection.getpeercert(binary_form=True) or b"").hexdigest()


def _plain(host: str, port: int, said: bytes) -> str:
    """Until the other side ends the connection."""
    got = b""
    with socket.create_connection((host, port), _WITHIN_S) as connection:
        connection.sendall(said)
        try:
            while more := connection.recv(4096):
                got += more
        except ConnectionResetError:
            pass
    return NOTHING if not got or got.startswith(_ALERT) else repr(got[:60])


def _grpc(host: str, access: Access, credentials: grpc.ChannelCredentials) -> str:
    options = [*access.options, ("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(f"{host}:{GRPC_PORT}", credentials, options) as channel:
        try:
            pb_grpc.GenerationServiceStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=_WITHIN_S)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return NOTHING if code is grpc.StatusCode.UNAVAILABLE else code.name
    return "an answer"


def _self_signed(access: Access) -> grpc.ChannelCredentials:
    """The key is right, but nobody who counts has signed the certificate."""
    made = signed("a stranger")
    shows = grpc.ssl_channel_credentials(access.tls.read()[0], made.key, made.pem)
    return grpc.composite_channel_credentials(shows, grpc.access_token_call_credentials(access.key))


_WHAT: dict[str, Callable[[str, Access], dict[str, str]]] = {"refused": refused, "certificates": certificates}


if __name__ == "__main__":
    host, name, what = sys.argv[1:]
    print(json.dumps(_WHAT[what](host, Access.read(os.environ[ACCESS]).to(name))))
