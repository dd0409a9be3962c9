"""The candidates by name: what each needs installed, and where its two ends are."""

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which

from benchmarks.transport_parts.seam import Connector, Server

_PACKAGES = {"grpc": "grpcio", "msgspec": "msgspec", "zmq": "pyzmq"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One candidate. `server` and `connector` are names in `module`, which is imported where it runs."""

    name: str
    what: str
    needs: tuple[str, ...]
    module: str
    server: str
    connector: str
    encrypted: bool = False

    def missing(self) -> list[str]:
        """What to install for it."""
        packages = [_PACKAGES[name] for name in self.needs if find_spec(name) is None]
        return packages + ["openssl, the program"] * (self.encrypted and which("openssl") is None)

    def ends(self) -> tuple[Server, Connector]:
        module = importlib.import_module(f"benchmarks.transport_parts.{self.module}")
        return getattr(module, self.server)(), getattr(module, self.connector)


BASELINE = "streams-json"
_GRPC = ("grpc", "msgspec")
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(BASELINE, "asyncio streams, JSON frames: today", (), "streams", "StreamServer", "connect_json"),
        Variant(
            "streams-msgspec",
            "today's frames, msgpack in them",
            ("msgspec",),
            "streams",
            "MsgpackServer",
            "connect_msgpack",
        ),
        Variant("framed", "own framing, msgspec, asyncio Protocol", ("msgspec",), "framed", "FramedServer", "connect"),
        Variant("framed-tls", "the same over TLS", ("msgspec",), "framed", "FramedServer", "connect", encrypted=True),
        Variant("grpc-stream", "grpc.aio, one stream both ways", _GRPC, "grpc_channel", "GrpcServer", "connect_stream"),
        Variant(
            "grpc-stream-tls",
            "the same over TLS",
            _GRPC,
            "grpc_channel",
            "GrpcServer",
            "connect_stream",
            encrypted=True,
        ),
        Variant("grpc-calls", "grpc.aio, a call a run", _GRPC, "grpc_channel", "GrpcServer", "connect_calls"),
        Variant(
            "grpc-calls-tls",
            "the same over TLS",
            _GRPC,
            "grpc_channel",
            "GrpcServer",
            "connect_calls",
            encrypted=True,
        ),
        Variant("zmq", "pyzmq, DEALER and ROUTER", ("zmq", "msgspec"), "zmq_sockets", "ZmqServer", "connect"),
    )
}
