"""A real service of two cells: what runs when one of them dies or hangs goes on, with the tokens it would have had."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

import grpc
import httpx
import psutil
import pytest

from tests.cluster.service import Service, running_service
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

MODES = ("diffusion", "mock_ar", "ar", "verified", "auto")
REQUESTS, TOKENS = 12, 128
_undisturbed: list[list[int]] = []
PATIENCE = {"queue_timeout_s": 120.0}  # on a busy machine another process takes longer than the usual half a minute


@pytest.fixture(scope="module")
def service(ray_cluster: None) -> Iterator[Service]:
    cluster = {"min_cells": 2, "max_cells": 2, **PATIENCE}
    with running_service(cell={"placement": "colocated"}, cluster=cluster) as running:
        yield running


def _asked(number: int) -> pb.GenerateRequest:
    mode = MODES[number % len(MODES)]
    params = pb.DecodingParams(mode=f"MODE_{mode.upper()}", max_new_tokens=TOKENS, ignore_eos=True, seed=number)
    params.temperature = 0.7 if number // len(MODES) % 2 else 0.0
    if mode == "diffusion":
        params.confidence_threshold = 1.0  # a token a step
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5 + number, 6, 7]), params=params)


def _replicas() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()[:1]).startswith("ray::ServeReplica:twotower:Cell"):
                found.append(process)
    return found


async def _two_cells(within_s: float = 90.0) -> list[psutil.Process]:
    """The replicas, once Serve says that both serve."""
    from ray import serve

    deadline = time.monotonic() + within_s
    while True:
        states = serve.status().applications["twotower"].deployments["Cell"].replica_states
        replicas = _replicas()
        if states == {"RUNNING": 2} and len(replicas) == 2:
            return replicas
        assert time.monotonic() < deadline, f"{states}, {replicas}"
        await asyncio.sleep(0.2)


async def _answers(
    stub: pb_grpc.GenerationServiceStub, begun: Callable[[int], None] = lambda number: None
) -> list[list[int]]:
    """Of all requests at once; `begun` hears which of them have a quarter of their answer."""

    async def one(number: int) -> list[int]:
        token_ids = list[int]()
        async for event in stub.GenerateStream(_asked(number)):
            assert event.HasField("finished") or event.block.start == len(token_ids)
            token_ids += event.block.token_ids
            if len(token_ids) > TOKENS // 4:
                begun(number)
        return token_ids

    return await asyncio.gather(*map(one, range(REQUESTS)))


async def undisturbed_answers(stub: pb_grpc.GenerationServiceStub) -> list[list[int]]:
    """What nothing has happened to: asked for once, since every service of these tests gives the same."""
    if not _undisturbed:
        _undisturbed.extend(await _answers(stub))
    return _undisturbed


@pytest.mark.parametrize("fault", [pytest.param("tower killed", marks=pytest.mark.long), "cell killed", "cell hung"])
async def test_runs_outlive_their_cell(service: Service, fault: str) -> None:
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        replicas = await _two_cells()
        undisturbed = await undisturbed_answers(stub)
        begun = set[int]()
        running = asyncio.create_task(_answers(stub, begun.add))
        while len(begun) < REQUESTS // 2:
            await asyncio.sleep(0.005)
        victim = replicas[0].pid
        if fault == "tower killed":
            victim = int((await service.stats()).homes[0]["pid"])
        os.kill(victim, signal.SIGSTOP if fault == "cell hung" else signal.SIGKILL)
        assert not running.done()
        try:
            assert await running == undisturbed
            assert [len(tokens) for tokens in undisturbed] == [TOKENS] * REQUESTS
            assert await _answers(stub) == undisturbed, "nobody is sent to the cell that hangs"
        finally:
            if fault == "cell hung":
                with contextlib.suppress(ProcessLookupError):  # on a busy machine Serve may have replaced it meanwhile
                    os.kill(victim, signal.SIGCONT)
        await _two_cells()


async def test_without_a_cell_the_service_says_so_and_waits_for_one(service: Service) -> None:
    async with (
        grpc.aio.insecure_channel(service.grpc) as channel,
        httpx.AsyncClient(base_url=f"http://{service.http}", timeout=60) as http,
    ):
        stub = pb_grpc.GenerationServiceStub(channel)
        for replica in await _two_cells():
            replica.kill()
        died = time.monotonic()
        waiting = asyncio.ensure_future(stub.Generate(_asked(0)))
        while (await http.get("/ready")).status_code == 200:
            await asyncio.sleep(0.05)
        assert time.monotonic() - died < 6.0
        assert len((await waiting).token_ids) == TOKENS
        await _two_cells()
