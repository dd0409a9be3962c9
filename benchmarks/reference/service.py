"""A service of its own for the benchmark: started, waited for, stopped. Measures the cold start on the way."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reference.paths import ServedPath
from twotower.core import Request

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S, STOP_LIMIT_S = 180.0, 60.0
_POLL_S = 0.1
_NOT_GIVEN = (20_000, 32_000)  # below those that Linux gives, above those of Ray's workers


@dataclass(frozen=True, slots=True)
class Service:
    """A service that has answered. Seconds from spawning its command to SERVING, and to the first token."""

    address: str
    healthy_s: float
    first_token_s: float


@asynccontextmanager
async def started(settings: Sequence[str], first: Request) -> AsyncIterator[Service]:
    """`python -m cluster up` on free loopback ports, until the block is left; in split placement unless told otherwise.

    SIGTERM leaves the block, too: a benchmark that is ended takes its service along.

    `settings` are `section.name=value` strings. Raises RuntimeError with the end of the service's output where it
    does not come up in time.
    """
    http_port, grpc_port = free_ports()
    fixed = ["cell.placement=split", f"ingress.http_port={http_port}", f"ingress.grpc_port={grpc_port}"]
    command = [sys.executable, "-m", "cluster", "up"]
    for setting in [*fixed, *settings]:
        command += ["--set", setting]
    address = f"127.0.0.1:{grpc_port}"
    with tempfile.TemporaryFile() as log:
        spawned = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            await _serving(address, process, spawned + START_LIMIT_S)
            healthy_s = time.perf_counter() - spawned
            await _first_token(address, first)
            yield Service(address, healthy_s, time.perf_counter() - spawned)
        except TimeoutError as error:
            log.seek(0)
            tail = log.read().decode(errors="replace")[-3000:]
            raise RuntimeError(f"{' '.join(command)}: {error}; its output ends with\n{tail}") from error
        finally:
            _stop(process)
            loop.remove_signal_handler(signal.SIGTERM)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ctrl-C, as a user would; what is left of the process group after the limit is killed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def _serving(address: str, process: "subprocess.Popen[bytes]", deadline: float) -> None:
    import grpc.aio
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with grpc.aio.insecure_channel(address, options=[("grpc.max_reconnect_backoff_ms", 200)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.perf_counter() < deadline:
            if process.poll() is not None:
                raise TimeoutError(f"ended with exit status {process.returncode}")
            with suppress(grpc.aio.AioRpcError):
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(_POLL_S)
    raise TimeoutError(f"not SERVING within {START_LIMIT_S:g} s")


async def _first_token(address: str, request: Request) -> None:
    async with ServedPath(address).open() as running:
        async for piece in running.generate(request):
            if piece.token_ids:
                return
    raise RuntimeError(f"the service at {address} answered without a token")


def free_ports() -> tuple[int, int]:
    """Two ports that are free now. Somebody else may take one before the service does; then it says so."""
    http, grpc = free_port(), free_port()
    return (http, grpc) if http != grpc else free_ports()


def free_port() -> int:
    """A port that is free now, and that the kernel gives nobody who asks for any port: Ray's processes take many."""
    while True:
        with suppress(OSError), socket.create_server(("127.0.0.1", random.randint(*_NOT_GIVEN))) as server:
            port: int = server.getsockname()[1]
            return port
