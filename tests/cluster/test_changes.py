"""A running service is deployed again with other settings: no stream is cut, and cells hand over what they run."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from cluster.config import ServiceConfig
from cluster.ops import deployment
from tests.cluster.service import Service, running_service
from tests.cluster.test_survival import MODES, _asked, _replicas
from tests.goldens import VENDORED
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

CELL = {"placement": "colocated"}
CLUSTER = {"min_cells": 1, "max_cells": 1, "num_routers": 2, "drain_timeout_s": 280.0}
WANTED = {"Cell": {"RUNNING": 1}, "Router": {"RUNNING": 2}}
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]  # of two routers on one port any gets it
CALLERS = 6


@pytest.fixture(scope="module")
def service(ray_cluster: None) -> Iterator[Service]:
    model = {"checkpoint": str((VENDORED / "tt_moe").resolve()), "max_sequence_length": 16384}
    with running_service(model=model, cell=CELL, cluster=CLUSTER) as running:
        yield running


class Callers:
    """Ask one answer after the other over both faces until told to stop; keep what came, and what went wrong."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.stop = False
        self.answers: dict[int, list[list[int]]] = {number: [] for number in range(CALLERS)}
        self.failed: list[str] = []

    async def run(self) -> None:
        await asyncio.gather(*map(self._call, range(CALLERS)))

    async def _call(self, number: int) -> None:
        async with (
            grpc.aio.insecure_channel(self._service.grpc, OWN_CONNECTION) as channel,
            httpx.AsyncClient(base_url=f"http://{self._service.http}", timeout=120) as http,
        ):
            await self._ask(number, pb_grpc.GenerationServiceStub(channel), http)

    async def _ask(self, number: int, stub: pb_grpc.GenerationServiceStub, http: httpx.AsyncClient) -> None:
        while not self.stop:
            try:
                ask = self._over_http(number, http) if number % 2 else self._over_grpc(number, stub)
                self.answers[number].append(await ask)
            except Exception as error:
                self.failed.append(f"{number}: {type(error).__name__}: {error}"[:500])

    async def _over_grpc(self, number: int, stub: pb_grpc.GenerationServiceStub) -> list[int]:
        return [token async for event in stub.GenerateStream(_asked(number)) for token in event.block.token_ids]

    async def _over_http(self, number: int, http: httpx.AsyncClient) -> list[int]:
        asked = _asked(number)
        body: dict[str, Any] = {
            "model": (await http.get("/v1/models")).json()["data"][0]["id"],
            "prompt": list(asked.token_ids.ids),
            "max_tokens": asked.params.max_new_tokens,
            "temperature": asked.params.temperature,
            "seed": asked.params.seed,
            "ignore_eos": True,
            "stream": True,
            "diffusion": {"mode": MODES[number % 3]},
        }
        if number % 3 == 0:
            body["diffusion"]["confidence_threshold"] = 1.0
        tokens, done = list[int](), False
        async with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    tokens += [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]
        assert done, "the stream was cut"
        return tokens


async def test_a_cell_that_is_to_go_hands_over_what_it_runs(service: Service) -> None:
    """It goes long before the answer ends that it had begun, and the answer goes on."""
    asked = _asked(0)
    asked.params.max_new_tokens = 9000
    old, starts, gone_at = {replica.pid for replica in _replicas()}, list[int](), -1
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        tokens = list[int]()
        call = stub.GenerateStream(asked)
        async for event in call:
            assert not event.HasField("finished"), "the old cell was there to the end"
            assert event.block.start == len(tokens)
            tokens += event.block.token_ids
            starts.append(event.block.start)
            if len(starts) == 2:
                _change(service, max_sequences=14)
            if gone_at < 0 and len(starts) % 20 == 0 and not old & {replica.pid for replica in _replicas()}:
                gone_at = len(starts)
            if 0 < gone_at <= len(starts) - 20:
                break
        call.cancel()
        asked.params.max_new_tokens = len(tokens)
        undisturbed = [t async for event in stub.GenerateStream(asked) for t in event.block.token_ids]
    assert tokens == undisturbed


def _change(service: Service, max_sequences: int) -> "asyncio.Future[None]":
    """Deploy the same service with other settings of its cells and routers."""
    values = service.values | {"cell": {**service.values["cell"], "max_sequences": max_sequences}}
    values["decode"] = {"confidence_threshold": 0.5 + max_sequences / 100}
    return asyncio.ensure_future(asyncio.to_thread(deployment.deploy, ServiceConfig.parse(values)))


async def test_no_stream_is_cut_when_settings_change(service: Service) -> None:
    from ray import serve

    callers = Callers(service)
    calling = asyncio.create_task(callers.run())
    try:
        while not all(callers.answers.values()):
            await asyncio.sleep(0.05)
            assert not callers.failed, callers.failed
        before = {replica.pid for replica in _replicas()}
        await _change(service, max_sequences=12)
        async with asyncio.timeout(150):
            while True:
                await asyncio.sleep(0.2)
                there = {replica.pid for replica in _replicas()}
                status = serve.status().applications["twotower"].deployments
                states = {name: dict(found.replica_states) for name, found in status.items()}
                if there and not there & before and states == WANTED:
                    break
        asked_later = {number: len(answers) for number, answers in callers.answers.items()}
        while any(len(callers.answers[number]) < count + 2 for number, count in asked_later.items()):
            await asyncio.sleep(0.05)
    finally:
        callers.stop = True
        await calling
    assert not callers.failed, callers.failed
    for number, answers in callers.answers.items():
        assert answers and all(answer == answers[0] for answer in answers), f"caller {number} got other tokens"
        assert answers[0]
