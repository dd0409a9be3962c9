"""A real service under clients that stay, that share an id, and when it or its router ends."""

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import psutil
import pytest

from cluster import ownership
from cluster.draining import drain
from tests.cluster.service import Service, running_service
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

STUCK = 200
LONG: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 900, "ignore_eos": True}
SLOW = {**LONG, "diffusion": {"confidence_threshold": 1.0}}


@pytest.fixture(scope="module")
def service(ray_cluster: None) -> Iterator[Service]:
    with running_service() as running:
        yield running


def client(service: Service) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{service.http}", timeout=60)


@asynccontextmanager
async def bodies_that_never_come(service: Service, count: int) -> AsyncIterator[None]:
    host, _, port = service.http.rpartition(":")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: 100\r\n\r\n{{".encode()
    writers = []
    for _ in range(count):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head)
        writers.append(writer)
    try:
        yield
    finally:
        for writer in writers:
            writer.close()


async def test_probes_and_refusals_wait_for_nobody(service: Service) -> None:
    """Of old the router had 112 slots: 140 bodies that never came held it up for as long as they stayed."""
    async with bodies_that_never_come(service, STUCK), client(service) as http:
        running = [asyncio.create_task(http.post("/v1/completions", json=SLOW)) for _ in range(80)]
        await asyncio.sleep(1.0)
        took = {}
        for name, call in {
            "health": lambda: http.get("/health"),
            "ready": lambda: http.get("/ready"),
            "models": lambda: http.get("/v1/models"),
            "refusal": lambda: http.post("/v1/completions", json={"prompt": 5}),
        }.items():
            began = time.monotonic()
            response = await call()
            took[name] = time.monotonic() - began
            assert response.status_code == (400 if name == "refusal" else 200)
        print("seconds:", {name: round(seconds, 3) for name, seconds in took.items()})
        assert max(took.values()) < 5, took  # 1 s on a machine that does nothing else
        more = [asyncio.create_task(http.post("/v1/completions", json=SLOW)) for _ in range(10)]
        for task in more:
            response = await task
            assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    await service.all_free()


async def test_one_request_id(service: Service) -> None:
    async with client(service) as http:
        for headers in ({}, {"x-request-id": "gateway"}):
            calls = [http.post("/v1/completions", json={"prompt": [5]}, headers=headers) for _ in range(4)]
            answers = await asyncio.gather(*calls)
            for response in answers:
                [shown] = response.headers.get_list("x-request-id")
                assert response.json()["request_id"] == shown == headers.get("x-request-id", shown)
            assert len({response.json()["id"] for response in answers}) == 4


async def test_a_router_that_dies(service: Service) -> None:
    async with client(service) as http:
        async with http.stream("POST", "/v1/completions", json=SLOW | {"stream": True}) as response:
            lines = response.aiter_lines()
            await anext(lines)
            waiting = asyncio.create_task(http.post("/v1/completions", json=SLOW))
            await asyncio.sleep(0.3)
            _kill_router()
            events = [line async for line in lines if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "unavailable_error"
        answer = await waiting
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "unavailable_error"
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
        assert not draining.is_alive() and "finishing the running requests" in said[0]
        await service.all_free()
        ownership.give_up()
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
