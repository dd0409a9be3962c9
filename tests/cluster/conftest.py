"""Both faces over scripted cells."""

from collections.abc import AsyncGenerator

import grpc
import httpx
import pytest

from cluster.faces.http.service import make_app
from cluster.runs import kept
from tests.cluster.fakes import ScriptedCells, generation, grpc_server
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc


@pytest.fixture(autouse=True)
def no_cell_is_known_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test of Serve's replicas has noted in this process is another one's no more."""
    monkeypatch.setattr(kept, "cells", frozenset())


@pytest.fixture
def cells() -> ScriptedCells:
    return ScriptedCells()


@pytest.fixture
async def http(cells: ScriptedCells) -> AsyncGenerator[httpx.AsyncClient, None]:
    app = make_app(generation(cells), lambda: cells.serves if cells.is_ready else set(), max_bytes=10_000)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as client:
        yield client


@pytest.fixture
async def channel(cells: ScriptedCells) -> AsyncGenerator[grpc.aio.Channel, None]:
    async with grpc_server(generation(cells)) as (address, _), grpc.aio.insecure_channel(address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> pb_grpc.GenerationServiceStub:
    return pb_grpc.GenerationServiceStub(channel)
