"""What listens in a tree of processes, and what it says to somebody who shows nothing. Linux."""

import asyncio
import time
from dataclasses import dataclass

import grpc
import psutil

_LOOPBACK = "127.0.0.1"
# A method of each of Ray's servers, and of Serve's between replicas.
_METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.serve.ASGIService/HandleRequest",
)
_SETTINGS = 4  # the kind of HTTP/2's first frame


@dataclass(frozen=True, order=True)
class Port:
    """`host` as it is bound."""

    process: str
    host: str
    port: int

    @property
    def at(self) -> str:
        return _LOOPBACK if self.host in ("0.0.0.0", "::") else self.host.removeprefix("::ffff:")

    @property
    def is_towers(self) -> bool:
        """Whether it is a tower process's, and for its own node alone."""
        return self.host == _LOOPBACK and self.process.startswith(("ray::ContextActor", "ray::DenoiserActor"))


def ports_of(root: psutil.Process) -> list[Port]:
    """One for each socket of the tree, however many processes share it."""
    found = set()
    for process in (root, *root.children(recursive=True)):
        try:
            name = _title(process)
            sockets = [each for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
        except psutil.NoSuchProcess:
            continue
        found |= {Port(name, each.laddr.ip, each.laddr.port) for each in sockets}
    return sorted(found)


def _title(process: psutil.Process) -> str:
    """Without the directory of a program. A command line reads empty while its process changes its title."""
    for _ in range(100):
        if (title := " ".join(process.cmdline()).strip()) != "":
            program, *rest = title.split(" ")
            return " ".join([program.rpartition("/")[2], *rest])[:80]
        time.sleep(0.02)
    return process.name()


async def said_by(port: Port) -> str:
    """`HTTP 401`, `HTTP 200 metrics`, `gRPC UNAUTHENTICATED`, …; `nothing` where it hangs up or stays silent, `gone`
    where nobody listens any more."""
    try:
        reader, writer = await asyncio.open_connection(port.at, port.port)
    except ConnectionRefusedError:
        return "gone"
    try:
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(1 if port.is_towers else 30):
            first = await reader.read(2000)
            if first.startswith(b"HTTP/1."):
                first += b"" if b"\r\n\r\n" in first else await reader.readuntil(b"\r\n\r\n")
    except (ConnectionError, TimeoutError):
        return "nothing"
    finally:
        writer.close()
    if first.startswith(b"HTTP/1."):
        metrics = " metrics" if b"version=0.0.4" in first else ""
        return f"HTTP {first.split()[1].decode()}{metrics}"
    if len(first) > 3 and first[3] == _SETTINGS:
        return await _said_over_grpc(port)
    return f"{first!r}" if first else "nothing"


async def _said_over_grpc(port: Port) -> str:
    """To calls without a token, and with one that nobody has. What is not there is not counted."""
    heard = set()
    async with grpc.aio.insecure_channel(f"{port.at}:{port.port}") as channel:
        for metadata in ((), (("authorization", "Bearer " + 64 * "0"),)):
            for method in _METHODS:
                try:
                    await channel.unary_unary(method)(b"", timeout=30, metadata=metadata)
                    heard.add("OK")
                except grpc.aio.AioRpcError as error:
                    heard.add(error.code().name)
    return "gRPC " + " ".join(sorted(heard - {"UNIMPLEMENTED"}))
