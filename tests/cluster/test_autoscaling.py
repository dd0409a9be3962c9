"""Cells come under load and go after it, and their GPUs (made-up ones) with them."""

import asyncio
from collections.abc import Callable

import grpc
import pytest
import ray

from cluster.ops import deployment
from tests.cluster.service import running_service
from tests.conftest import FAKE_GPUS
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(180)]


async def until(true: Callable[[], bool], within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.2)


def free_gpus() -> float:
    return float(ray.available_resources().get("GPU", 0))


async def test_a_cell_comes_under_load_and_goes_after_it(ray_cluster: None) -> None:
    await until(lambda: free_gpus() == FAKE_GPUS, 20)
    cluster = {"max_cells": 2, "upscale_delay_s": 0, "downscale_delay_s": 2}
    with running_service(
        cell={"gpus_per_tower": 1, "max_sequences": 4}, cluster={**cluster, "drain_timeout_s": 20.0}
    ) as service:
        assert free_gpus() == FAKE_GPUS - 2
        async with grpc.aio.insecure_channel(service.grpc) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            params = pb.DecodingParams(mode=pb.MODE_MOCK_AR, max_new_tokens=200, ignore_eos=True)
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), params=params)
            stopping = asyncio.Event()

            async def load() -> None:
                while not stopping.is_set():
                    await stub.Generate(request)

            clients = [asyncio.create_task(load()) for _ in range(6)]
            await until(lambda: deployment.progress().cells == 2, 60)
            assert free_gpus() == FAKE_GPUS - 4
            stopping.set()
            await asyncio.gather(*clients)
            await until(lambda: deployment.progress().cells == 1 and free_gpus() == FAKE_GPUS - 2, 60)
            assert (await stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5])))).token_ids
    await until(lambda: free_gpus() == FAKE_GPUS, 20)
