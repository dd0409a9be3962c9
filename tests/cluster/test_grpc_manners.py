"""What gRPC clients expect beside answers: connections that are kept alive, ids that are labels."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2

from cluster.faces.grpc.boundary import guarded
from cluster.faces.grpc.service import GrpcServer
from cluster.runs.admission import Admission
from cluster.runs.generation import Generation
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, generation, grpc_server, served_model
from tests.cluster.test_grpc import Stub, ask, details_of
from tests.cluster.test_http import raising
from twotower.core import AnswerEvent, Request
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


@pytest.mark.parametrize("metadata", ["a b", "x" * 129])
async def test_metadata_that_cannot_be_a_label_are_left_out(stub: Stub, cells: ScriptedCells, metadata: str) -> None:
    """Others than printable ones gRPC itself does not carry."""
    outside = (("x-request-id", metadata),)
    assert (await stub.Generate(ask(), metadata=outside)).request_id == cells.requests[-1].id
    assert (await stub.Generate(ask(request_id="mine"), metadata=outside)).request_id == "mine"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(ask(request_id=metadata))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "request_id: got" in caught.value.details()


@pytest.mark.parametrize("label", ["gateway", ""])
@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "Score"])
async def test_both_ids_come_back(stub: Stub, cells: ScriptedCells, method: str, label: str) -> None:
    """At the call's end, for gRPC repeats no call of which the client has heard something."""
    request = pb.ScoreRequest(prompt_text="a", continuation_text="b") if method == "Score" else ask()
    call = getattr(stub, method)(request, metadata=(("x-request-id", label),) if label else ())
    answers = [event async for event in call] if method == "GenerateStream" else [await call]
    [asked] = [*cells.requests, *cells.scored]
    assert ids_of(await call.trailing_metadata()) == (label or asked.id, asked.id)
    assert {answer.request_id for answer in answers} == {label or asked.id}


async def test_both_ids_come_back_with_an_error(
    stub: Stub, cells: ScriptedCells, caplog: pytest.LogCaptureFixture
) -> None:
    cells.fail = raising(ZeroDivisionError("x"), at_block=0)  # type: ignore[arg-type]
    with pytest.raises(grpc.aio.AioRpcError) as caught, caplog.at_level(logging.ERROR):
        await stub.Generate(ask(), metadata=(("x-request-id", "gateway"),))
    label, own_id = ids_of(caught.value.trailing_metadata())
    assert label == "gateway" and own_id == cells.requests[-1].id and f"request {own_id}: internal" in caplog.text
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(ask(stop=["a"] * 17))
    assert ids_of(caught.value.trailing_metadata())[0].startswith("req-")
    assert details_of(caught.value, error_details_pb2.BadRequest) is not None


def ids_of(metadata: Any) -> tuple[str, str]:
    found = dict(metadata)
    return found["x-request-id"], found["x-twotower-id"]


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
            assert (await stub.GetModelInfo(pb.GetModelInfoRequest())).model_name == "fake"
            assert (await running).text
    finally:
        await server.stop(0)


async def test_a_client_that_does_not_read_has_its_place_until_the_deadline(
    cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond some megabytes a write waits for the reader."""
    large = pb.GenerateStreamResponse(block=pb.CommittedBlock(text="x" * 3_000_000))
    monkeypatch.setattr("cluster.faces.grpc.service.piece_messages", lambda *told: [large])
    service = Generation(served_model(ByteTokenizer()), cells, default_timeout_s=0.3)
    async with grpc_server(service) as (address, _), grpc.aio.insecure_channel(address) as channel:
        call = Stub(channel).GenerateStream(ask())
        async with asyncio.timeout(10):
            while not service.admission.running:
                await asyncio.sleep(0.001)
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
        def trailing_metadata(self) -> None:
            return None

        async def abort(self, code: grpc.StatusCode, details: str, metadata: object) -> None:
            codes.append(code)

    async def write(message: object, context: object) -> None:
        raise grpc.aio.InternalError("Failed to execute batch")

    with caplog.at_level(logging.ERROR):
        await guarded(write, pb.GenerateRequest, 256)(b"", Gone())
    assert codes == [grpc.StatusCode.CANCELLED] and not caplog.records


class Held(ScriptedCells):
    """After its first event an answer waits to be let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def _events(self, request: Request) -> AsyncGenerator[AnswerEvent, None]:
        async for event in super()._events(request):
            yield event
            await self.go.wait()


def connections_to(port: int) -> set[int]:
    """The clients' ports, of this process."""
    found = psutil.Process().net_connections("tcp")
    return {each.laddr.port for each in found if each.raddr and each.raddr.port == port}


async def test_an_old_connection_takes_no_more_calls_and_cuts_none() -> None:
    """So a client that stays finds other routers. A grace period of gRPC's would have ended the stream."""
    cells = Held()
    server = GrpcServer(generation(cells), "127.0.0.1", 0, max_age_s=0.1)
    await server.start()
    try:
        async with asyncio.timeout(20), grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = Stub(channel)
            stream = aiter(stub.GenerateStream(ask()))
            events = [await anext(stream)]
            seen = connections_to(server.port)
            while len(seen) < 4:
                await stub.GetModelInfo(pb.GetModelInfoRequest())
                seen |= connections_to(server.port)
            cells.go.set()
            events += [event async for event in stream]
            assert events[-1].HasField("finished") and len(events) > 2
    finally:
        await server.stop(0)
