"""A real service under clients that stay, that share an id, and when it or its router ends."""

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median
from typing import Any

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.faces.http.request_body import MAX_BODIES
from cluster.ops import ownership
from cluster.ops.draining import drain
from tests.cluster.service import Service, running_service
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

PAGE = "https://page.example"
STUCK, ENDLESS, PROBES, IDLE = 200, 300, 9, 200
WRONG = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), params=pb.DecodingParams(seed=-1))
RIGHT = pb.GenerateRequest(
    token_ids=pb.TokenIds(ids=[5]), params=pb.DecodingParams(max_new_tokens=900, ignore_eos=True)
)
FOUND_S, FOUND = 3.0, (None, grpc.StatusCode.DEADLINE_EXCEEDED)  # what a request gets that finds room after all
LONG: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 900, "ignore_eos": True}
SLOW = {**LONG, "diffusion": {"confidence_threshold": 1.0}}


@pytest.fixture(scope="module")
def service(ray_cluster: None) -> Iterator[Service]:
    with running_service(ingress={"cors_origins": [PAGE]}) as running:
        yield running


def client(service: Service) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{service.http}", timeout=60)


@asynccontextmanager
async def bodies_that_never_come(
    service: Service, count: int, address: str = "127.0.0.1"
) -> AsyncIterator[list[asyncio.StreamReader]]:
    host, _, port = service.http.rpartition(":")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: 100\r\n\r\n{{".encode()
    readers, writers = [], []
    for _ in range(count):
        reader, writer = await asyncio.open_connection(host, int(port), local_addr=(address, 0))
        writer.write(head)
        readers.append(reader)
        writers.append(writer)
    try:
        yield readers
    finally:
        for writer in writers:
            writer.close()


async def endless(http: httpx.AsyncClient, refused: asyncio.Event) -> None:
    """A client that always wants more, and comes again when it is refused."""
    while True:
        response = await http.post("/v1/completions", json=SLOW)
        if response.status_code == 429:
            refused.set()
            await asyncio.sleep(int(response.headers["retry-after"]))


@asynccontextmanager
async def endless_clients(service: Service, count: int) -> AsyncIterator[None]:
    """So many of them, from the moment on that one finds no room."""
    limits, refused = httpx.Limits(max_connections=None), asyncio.Event()
    async with httpx.AsyncClient(base_url=f"http://{service.http}", timeout=120, limits=limits) as http:
        running = [asyncio.create_task(endless(http, refused)) for _ in range(count)]
        try:
            await refused.wait()
            yield
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def test_probes_and_refusals_wait_for_nobody(service: Service) -> None:
    """Of old the router had 112 slots: bodies that never came held it up for as long as they stayed.

    The median counts, because other processes may have the machine for a moment. Also, once in a while a probe finds
    the room that a request has just left.
    """
    async with (
        client(service) as http,
        grpc.aio.insecure_channel(service.grpc) as channel,
        bodies_that_never_come(service, STUCK),
        endless_clients(service, ENDLESS),
    ):
        stub = pb_grpc.GenerationServiceStub(channel)
        full = grpc.StatusCode.RESOURCE_EXHAUSTED
        probes: dict[str, tuple[Callable[[], Awaitable[object]], object]] = {
            "health": (lambda: status_of(http.get("/health")), 200),
            "ready": (lambda: status_of(http.get("/ready")), 200),
            "models": (lambda: status_of(http.get("/v1/models")), 200),
            "wrong": (lambda: status_of(http.post("/v1/completions", json={"prompt": 5})), 400),
            "no room": (lambda: status_of(http.post("/v1/completions", json=SLOW, timeout=FOUND_S)), 429),
            "gRPC health": (lambda: code_of(serving(channel)), grpc.StatusCode.OK),
            "gRPC wrong": (lambda: code_of(stub.Generate(WRONG)), grpc.StatusCode.INVALID_ARGUMENT),
            "gRPC no room": (lambda: code_of(stub.Generate(RIGHT, timeout=FOUND_S)), full),
        }
        took: dict[str, list[float]] = {name: [] for name in probes}
        for _ in range(PROBES):
            for name, (probe, wanted) in probes.items():
                began = time.monotonic()
                got = await probe()
                assert got == wanted or (name.endswith("no room") and got in FOUND), (name, got)
                took[name].append(time.monotonic() - began)
        print("seconds, median and worst:", {n: (round(median(t), 3), round(max(t), 3)) for n, t in took.items()})
        assert max(map(median, took.values())) < 1.0, took
    await service.all_free()


async def head_of(reader: asyncio.StreamReader) -> bytes:
    """The first line of an answer, all of which is read."""
    first, *headers = (await reader.readuntil(b"\r\n\r\n")).splitlines()
    [length] = [int(line.partition(b":")[2]) for line in headers if line.lower().startswith(b"content-length:")]
    await reader.readexactly(length)
    return first


async def status_of(call: Awaitable[httpx.Response]) -> int | None:
    try:
        return (await call).status_code
    except httpx.TimeoutException:
        return None


async def code_of(call: Awaitable[object]) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def serving(channel: grpc.aio.Channel) -> Awaitable[object]:
    call: Awaitable[object] = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    return call


async def test_idle_connections_do_not_stop_answers(service: Service) -> None:
    """Over HTTP half of them have said nothing yet, half have had an answer; over gRPC each is a client's own."""
    host, _, port = service.http.rpartition(":")
    ask = f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with AsyncExitStack() as opened:
        channels = [
            await opened.enter_async_context(grpc.aio.insecure_channel(service.grpc, options=own)) for _ in range(IDLE)
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        connections = [await asyncio.open_connection(host, int(port)) for _ in range(IDLE)]
        for _, writer in connections:
            opened.callback(writer.close)
        for reader, writer in connections[::2]:
            writer.write(ask)
            assert await asyncio.wait_for(head_of(reader), 10) == b"HTTP/1.1 200 OK"
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), params=pb.DecodingParams(max_new_tokens=4))
        async with asyncio.timeout(20), client(service) as http, grpc.aio.insecure_channel(service.grpc) as another:
            answer = await http.post("/v1/completions", json={"prompt": [5], "max_tokens": 4})
            assert answer.status_code == 200 and len(answer.json()["choices"][0]["token_ids"]) == 4
            for channel in (another, channels[0], channels[-1]):
                assert len((await pb_grpc.GenerationServiceStub(channel).Generate(request)).token_ids) == 4
            for reader, writer in connections[-2:]:  # each way of being idle
                writer.write(ask)
                assert await head_of(reader) == b"HTTP/1.1 200 OK"
    await service.all_free()


async def test_one_client_does_not_take_all_places_for_bodies(service: Service) -> None:
    """Of Serve's proxy the router hears who the client is."""
    async with client(service) as http, bodies_that_never_come(service, MAX_BODIES, "127.0.0.9") as readers:
        last = await asyncio.wait_for(readers[-1].readuntil(b"}}"), 60)
        assert b" 429 " in last and b"of one caller" in last
        answer = await http.post("/v1/completions", json={"prompt": [5], "max_tokens": 1})
        assert answer.status_code == 200


async def test_one_request_id(service: Service) -> None:
    async with client(service) as http:
        for headers in ({}, {"x-request-id": "gateway"}, {"x-request-id": "no label"}):
            calls = [http.post("/v1/completions", json={"prompt": [5]}, headers=headers) for _ in range(4)]
            answers = await asyncio.gather(*calls)
            for response in answers:
                [shown] = response.headers.get_list("x-request-id")
                assert response.json()["request_id"] == shown and (shown == "gateway") is (
                    "gateway" in headers.values()
                )
            assert len({response.json()["id"] for response in answers}) == 4


@pytest.mark.parametrize(("origin", "status"), [(PAGE, 200), ("https://other.example", 400)])
async def test_a_browser_asks_first(service: Service, origin: str, status: int) -> None:
    async with client(service) as http:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        answer = await http.options("/v1/completions", headers=headers)
        assert answer.status_code == status
        assert answer.headers.get("access-control-allow-origin") == (PAGE if status == 200 else None)
        refused = await http.post("/v1/completions", json={"prompt": 5}, headers={"origin": origin})
        assert refused.status_code == 400 and ("access-control-allow-origin" in refused.headers) == (status == 200)


async def test_a_router_that_dies(service: Service) -> None:
    async with client(service) as http:
        await http.get("/v1/models", headers={"origin": PAGE})
        async with http.stream("POST", "/v1/completions", json=SLOW | {"stream": True}) as response:
            lines = response.aiter_lines()
            await anext(lines)
            waiting = asyncio.create_task(http.post("/v1/completions", json=SLOW, headers={"origin": PAGE}))
            await asyncio.sleep(0.3)
            _kill_router()
            events = [line async for line in lines if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "unavailable_error"
        answer = await waiting
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "unavailable_error"
        assert answer.headers["access-control-allow-origin"] == PAGE, "the proxy knows who may read"
        async with asyncio.timeout(60):
            while (await http.post("/v1/completions", json={"prompt": [5]})).status_code != 200:
                await asyncio.sleep(0.5)


async def test_a_service_that_shuts_down(service: Service) -> None:
    """Last: nothing is left of the service that the tests above used."""
    from ray import serve

    from cluster.app import APP_NAME

    async with client(service) as http, grpc.aio.insecure_channel(service.grpc) as channel:
        async with http.stream("POST", "/v1/completions", json=SLOW | {"stream": True}) as response:
            lines = response.aiter_lines()
            await anext(lines)
            said, mark = list[str](), _marked()
            draining = threading.Thread(target=drain, args=(mark, 3.0, said.append))
            draining.start()
            async with asyncio.timeout(10):
                while (refused := await http.post("/v1/completions", json={"prompt": [5]})).status_code == 200:
                    await asyncio.sleep(0.05)
            assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
            assert refused.json()["error"]["message"] == "the service is shutting down"
            assert (await http.get("/ready")).status_code == 503
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await pb_grpc.GenerationServiceStub(channel).Generate(
                    pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]))
                )
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            events = [line async for line in lines if line]
        assert "the service has shut down" in events[-1] and "unavailable_error" in events[-1]
        await asyncio.to_thread(draining.join, 20)
        assert not draining.is_alive() and said[0] == "stopping" and "finishing the running requests" in said[1]
        await service.all_free()
        ownership.give_up(mark)
        await asyncio.to_thread(serve.delete, APP_NAME)
        gone = await http.get("/v1/models")
        assert gone.status_code == 503 and gone.json()["error"]["type"] == "unavailable_error"


def _marked() -> bytes:
    """As an `up` marks what it deploys."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(ownership._KEY, b"ours", namespace=ownership._NAMESPACE)
    return b"ours"


def _kill_router() -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()[:1]).startswith("ray::ServeReplica:twotower:Router"):
                os.kill(process.pid, signal.SIGKILL)
