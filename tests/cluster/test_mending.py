"""A real service of one cell in two processes: a tower dies or hangs, and no request notices but by waiting."""

import asyncio
import os
import signal
from collections.abc import Iterator

import grpc
import pytest

from tests.cluster.service import Service, running_service
from tests.cluster.test_survival import (
    MODES,
    PATIENCE,
    REQUESTS,
    TOKENS,
    _answers,
    _asked,
    _replicas,
    undisturbed_answers,
)
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def service(ray_cluster: None) -> Iterator[Service]:
    cluster = {"min_cells": 1, "max_cells": 1, **PATIENCE}
    with running_service(cell={"placement": "split"}, cluster=cluster) as running:
        yield running


async def _pids(service: Service) -> list[int]:
    """Of the context tower's process, then the denoiser's."""
    return [int(home["pid"]) for home in (await service.stats()).homes]


@pytest.mark.parametrize(
    ("tower", "blow"),
    [
        pytest.param("denoiser", signal.SIGKILL, id="denoiser killed"),
        pytest.param("context", signal.SIGSTOP, id="context hung"),
        pytest.param("denoiser", signal.SIGSTOP, id="denoiser hung", marks=pytest.mark.long),
        pytest.param("context", signal.SIGKILL, id="context killed", marks=pytest.mark.long),
    ],
)
async def test_runs_outlive_a_tower(service: Service, tower: str, blow: signal.Signals) -> None:
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        replicas, pids = [replica.pid for replica in _replicas()], await _pids(service)
        undisturbed = await undisturbed_answers(stub)
        begun = set[int]()
        running = asyncio.create_task(_answers(stub, begun.add))
        while len(begun) < REQUESTS // 2:
            await asyncio.sleep(0.005)
        victim = ("context", "denoiser").index(tower)
        os.kill(pids[victim], blow)
        assert not running.done()
        if tower == "denoiser" and blow is signal.SIGKILL:
            answer = await asyncio.wait_for(stub.Generate(_asked(MODES.index("ar"))), 20)
            assert len(answer.token_ids) == TOKENS
        assert await running == undisturbed
        assert [replica.pid for replica in _replicas()] == replicas, "Serve has replaced nothing"
        now = await _pids(service)
        assert now[victim] != pids[victim] and now[1 - victim] == pids[1 - victim]
        for number in range(len(MODES)):
            assert (await stub.Generate(_asked(number))).token_ids == undisturbed[number]
