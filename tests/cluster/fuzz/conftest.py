"""Both faces of one service over scripted cells."""

from collections.abc import AsyncGenerator

import grpc
import httpx
import pytest

from cluster.faces.http.service import make_app
from cluster.runs.generation import Generation
from tests.cluster.fakes import ScriptedCells, all_modes, generation, grpc_server


@pytest.fixture
def service(cells: ScriptedCells) -> Generation:
    return generation(cells)


@pytest.fixture
async def http(service: Generation) -> AsyncGenerator[httpx.AsyncClient, None]:
    transport = httpx.ASGITransport(make_app(service, all_modes, max_bytes=10_000))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as client:
        yield client


@pytest.fixture
async def channel(service: Generation) -> AsyncGenerator[grpc.aio.Channel, None]:
    async with grpc_server(service) as (address, _), grpc.aio.insecure_channel(address) as channel:
        yield channel
