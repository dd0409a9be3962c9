"""What gRPC clients expect beside answers: connections that are kept alive, ids that are labels."""

import asyncio
import logging
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from cluster.admission import Admission
from cluster.generation import Generation
from cluster.grpc_boundary import guarded
from cluster.grpc_service import GrpcServer
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, generation, grpc_server, served_model
from tests.cluster.test_grpc import Stub, ask, details_of
from twotower.pb.twotower.v1 import generation_pb2 as pb

PING_MS = 1000  # as often as gRPC's clients ever do
PINGING = [
    ("grpc.keepalive_time_ms", PING_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


@pytest.mark.slow
@pytest.mark.parametrize("calling", [True, False])
async def test_clients_may_ping_as_often_as_we_say(cells: ScriptedCells, calling: bool) -> None:
    """A server left as it comes ends the connection at the third ping within 5 minutes, or 2 hours without a call."""
    server = GrpcServer(generation(cells), "127.0.0.1", 0, ping_interval_s=PING_MS / 2000)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=PINGING) as channel:
            stub = Stub(channel)
            await stub.GetModelInfo(pb.GetModelInfoRequest())
            cells.pace_s = 6.5
            call = stub.Generate(ask(params=pb.DecodingParams(max_new_tokens=4))) if calling else None
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(6):
                    await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
            if call is not None:
                assert (await call).text
    finally:
        await server.stop(0)


async def test_a_label_comes_back_and_is_nobodys_key(stub: Stub, cells: ScriptedCells) -> None:
    cells.pace_s = 0.005
    metadata = (("x-request-id", "gateway"),)
    calls = [stub.Generate(ask(), metadata=metadata), stub.Generate(ask(), metadata=metadata)]
    calls.append(stub.Generate(ask(request_id="mine"), metadata=metadata))
    assert [answer.request_id for answer in await asyncio.gather(*calls)] == ["gateway", "gateway", "mine"]
    assert len({request.id for request in cells.requests}) == 3
    drawn = await stub.Generate(ask())
    assert drawn.request_id == cells.requests[-1].id
    score = pb.ScoreRequest(prompt_text="a", continuation_text="b")
    assert (await stub.Score(score, metadata=metadata)).request_id == "gateway"
    assert cells.scored[0].id != "gateway"


async def test_beyond_what_the_cells_hold_is_refused_with_a_hint(cells: ScriptedCells) -> None:
    cells.pace_s = 0.02
    service = Generation(served_model(ByteTokenizer()), cells, admission=Admission(capacity=1, slots=1))
    server = GrpcServer(service, "127.0.0.1", 0)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = Stub(channel)
            running = asyncio.ensure_future(stub.Generate(ask()))
            while not cells.open:
                await asyncio.sleep(0.001)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(ask())
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            hint = details_of(caught.value, error_details_pb2.RetryInfo)
            assert isinstance(hint, error_details_pb2.RetryInfo) and 1 <= hint.retry_delay.seconds <= 60
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(pb.GenerateRequest(text="Hi", params=pb.DecodingParams(temperature=-3)))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, "what is wrong is said all the same"
            assert (await stub.GetModelInfo(pb.GetModelInfoRequest())).model_name == "fake"
            assert (await running).text
    finally:
        await server.stop(0)


async def test_a_client_that_does_not_read_has_its_place_until_the_deadline(
    cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond some megabytes a write waits for the reader."""
    large = pb.GenerateStreamResponse(block=pb.CommittedBlock(text="x" * 3_000_000))
    monkeypatch.setattr("cluster.grpc_service.chunk_messages", lambda order, chunk: [large])
    service = Generation(served_model(ByteTokenizer()), cells, default_timeout_s=0.3)
    async with grpc_server(service) as (address, _), grpc.aio.insecure_channel(address) as channel:
        call = Stub(channel).GenerateStream(ask())
        while not service.admission.running:
            await asyncio.sleep(0.001)
        async with asyncio.timeout(10):
            while service.admission.running or cells.open:
                await asyncio.sleep(0.01)
        assert not call.done()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_write_to_a_client_that_has_gone_is_no_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    codes = list[grpc.StatusCode]()

    class Gone:
        async def abort_with_status(self, status: Any) -> None:
            codes.append(status.code)

    async def write(message: object, context: object) -> None:
        raise grpc.aio.InternalError("Failed to execute batch")

    with caplog.at_level(logging.ERROR):
        await guarded(write, pb.GenerateRequest)(b"", Gone())
    assert codes == [grpc.StatusCode.CANCELLED] and not caplog.records
