"""The gRPC face over scripted cells, through a real server on a loopback port."""

import asyncio
import logging

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from tests.cluster.fakes import ScriptedCells, generation, grpc_server, tokens
from tests.cluster.test_http import TEXT, raising
from twotower.core import Mode
from twotower.errors import Cancelled, DeadlineExceeded, NumericalError, Overloaded, TwoTowerError, Unavailable
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

Stub = pb_grpc.GenerationServiceStub

SERVICE = "twotower.v1.GenerationService"


def ask(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"text": "Hi", **fields})


def details_of(error: grpc.RpcError, kind: type) -> object:
    """The detail of this kind in an error's google.rpc.Status."""
    status = rpc_status.from_call(error)
    for packed in status.details:
        detail = kind()
        if packed.Unpack(detail):
            return detail
    return None


async def test_whole_answer(stub: Stub) -> None:
    answer = await stub.Generate(ask(request_id="r-1", params=pb.DecodingParams(seed=7)))
    assert answer.request_id == "r-1" and answer.text == TEXT and tuple(answer.token_ids) == tokens(TEXT)
    assert answer.finished.finish_reason == pb.FINISH_REASON_STOP
    assert answer.finished.usage == pb.Usage(
        prompt_tokens=3, completion_tokens=len(tokens(TEXT)), num_steps=20, num_blocks=10
    )
    assert answer.finished.seed == 7 and answer.finished.mode == pb.MODE_DIFFUSION


async def test_stream_is_one_event_per_block_and_equals_the_whole(stub: Stub) -> None:
    whole = await stub.Generate(ask(request_id="r", params=pb.DecodingParams(seed=1)))
    *blocks, last = [e async for e in stub.GenerateStream(ask(request_id="r", params=pb.DecodingParams(seed=1)))]
    assert [event.block.start for event in blocks] == list(range(0, 40, 4))
    assert "".join(event.block.text for event in blocks) == whole.text
    assert [token for event in blocks for token in event.block.token_ids] == list(whole.token_ids)
    assert last.finished == whole.finished and last.request_id == "r"


async def test_every_parameter_reaches_the_cell(stub: Stub, cells: ScriptedCells) -> None:
    ids = pb.TokenIds(ids=[5, 6])
    diffusion = pb.DecodingParams(
        max_new_tokens=9, block_size=8, steps_per_block=4, confidence_threshold=0.0, temperature=0.5, ignore_eos=False
    )
    await stub.Generate(pb.GenerateRequest(token_ids=ids, params=diffusion, priority=-7))
    plain = pb.DecodingParams(mode=pb.MODE_MOCK_AR, top_k=3, top_p=0.5, seed=0, stop_token_ids=[9])
    await stub.Generate(ask(params=plain, stop=["things"]))
    first, second = (request.params for request in cells.requests)
    assert cells.requests[0].prompt_token_ids == (5, 6)
    assert [request.priority for request in cells.requests] == [-7, 0]
    assert (first.max_new_tokens, first.block_size, first.steps_per_block) == (9, 8, 4)
    assert (first.confidence_threshold, first.temperature, first.ignore_eos) == (0.0, 0.5, False)
    assert (second.mode, second.top_k, second.top_p, second.seed, second.stop_token_ids) == ("mock_ar", 3, 0.5, 0, (9,))


async def test_model_info(stub: Stub) -> None:
    info = await stub.GetModelInfo(pb.GetModelInfoRequest())
    assert info.model_name == "fake" and info.vocab_size == 260 and info.max_sequence_length == 256
    assert list(info.modes) == [pb.MODE_DIFFUSION, pb.MODE_MOCK_AR, pb.MODE_AR, pb.MODE_VERIFIED, pb.MODE_AUTO]
    assert info.defaults.max_new_tokens == 128 and info.defaults.confidence_threshold == 0.8
    assert not info.defaults.HasField("seed")
    assert info.has_tokenizer and info.checkpoint_fingerprint and info.version


async def test_without_a_tokenizer_token_ids_work_and_text_is_refused(cells: ScriptedCells) -> None:
    async with (
        grpc_server(generation(cells, with_tokenizer=False)) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = Stub(channel)
        answer = await stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5])))
        assert tuple(answer.token_ids) == tokens(TEXT) and answer.text == ""
        for refused in (ask(), pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), stop=["a"])):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(refused)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "no tokenizer" in caught.value.details()


@pytest.mark.parametrize(
    ("error", "code", "at_block"),
    [
        (Overloaded("full"), grpc.StatusCode.RESOURCE_EXHAUSTED, 0),  # what has begun waits for room instead
        *((Unavailable("gone"), grpc.StatusCode.UNAVAILABLE, block) for block in (0, 2)),
        *((DeadlineExceeded("not finished within 60 s"), grpc.StatusCode.DEADLINE_EXCEEDED, block) for block in (0, 2)),
        *((Cancelled("left"), grpc.StatusCode.CANCELLED, block) for block in (0, 2)),
        *((NumericalError("NaN"), grpc.StatusCode.ABORTED, block) for block in (0, 2)),
    ],
)
async def test_errors_have_their_codes_and_details(
    stub: Stub, cells: ScriptedCells, error: TwoTowerError, code: grpc.StatusCode, at_block: int
) -> None:
    cells.fail = raising(error, at_block)
    seen = 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.GenerateStream(ask()):
            seen += 1
    assert seen == at_block
    assert caught.value.code() is code and caught.value.details() == str(error)
    retry = details_of(caught.value, error_details_pb2.RetryInfo)
    assert (retry is not None) == isinstance(error, Overloaded | Unavailable)
    assert cells.open == 0


@pytest.mark.parametrize("at_block", [0, 1])
async def test_no_traceback_leaves_and_the_log_has_it(
    stub: Stub, cells: ScriptedCells, caplog: pytest.LogCaptureFixture, at_block: int
) -> None:
    cells.fail = raising(ZeroDivisionError("the secret is 42"), at_block)
    for call in (stub.Generate(ask()), stub.GenerateStream(ask())):
        with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as caught:
            if isinstance(call, grpc.aio.UnaryUnaryCall):
                await call
            else:
                [_ async for _ in call]
        seen = repr(caught.value) + str(caught.value.trailing_metadata())
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "Traceback" not in seen and "secret" not in seen and "ZeroDivision" not in seen
        assert caught.value.details().split()[-1] in caplog.text and "the secret is 42" in caplog.text


async def test_the_deadline_reaches_the_cell(stub: Stub, cells: ScriptedCells) -> None:
    await stub.Generate(ask(), timeout=20)
    await stub.Generate(ask())
    assert 15 < cells.timeouts[0] < 21 and 59 < cells.timeouts[1] <= 60


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("way", ["cancel", "deadline"])
async def test_a_client_that_leaves_frees_its_sequence(
    stub: Stub, cells: ScriptedCells, streaming: bool, way: str
) -> None:
    cells.pace_s = 60
    timeout = 0.2 if way == "deadline" else None
    call = (stub.GenerateStream if streaming else stub.Generate)(ask(), timeout=timeout)
    waiting = asyncio.ensure_future(call.read() if streaming else call)
    async with asyncio.timeout(10):
        while not cells.timeouts:  # it has begun, and may have ended since
            await asyncio.sleep(0.001)
    if way == "cancel":
        call.cancel()
    async with asyncio.timeout(2):
        while cells.open:
            await asyncio.sleep(0.001)
    if way == "deadline":
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.gather(waiting, return_exceptions=True)


async def test_health_follows_readiness_and_drain(cells: ScriptedCells) -> None:
    async with (
        grpc_server(generation(cells)) as (address, server),
        grpc.aio.insecure_channel(address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        states = health_pb2.HealthCheckResponse
        for service in ("", SERVICE, *(f"{SERVICE}.{mode}" for mode in Mode)):
            request = health_pb2.HealthCheckRequest(service=service)
            assert (await health.Check(request)).status == states.NOT_SERVING
            await server.set_served(set(Mode))
            assert (await health.Check(request)).status == states.SERVING
            await server.set_served({Mode.AR})
            needs_denoiser = service.endswith(("diffusion", "mock_ar", "verified", "auto"))
            assert (await health.Check(request)).status == (states.NOT_SERVING if needs_denoiser else states.SERVING)
            await server.set_served(set())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="no.such"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_of_a_mode_is_watched(cells: ScriptedCells) -> None:
    """Each change comes by itself."""
    async with (
        grpc_server(generation(cells)) as (address, server),
        grpc.aio.insecure_channel(address) as channel,
    ):
        asked = health_pb2.HealthCheckRequest(service=f"{SERVICE}.diffusion")
        watching = health_pb2_grpc.HealthStub(channel).Watch(asked, timeout=30)
        for served in (set[Mode](), set(Mode), {Mode.AR}, set(Mode)):
            await server.set_served(served)
            wanted = health_pb2.HealthCheckResponse.SERVING if Mode.DIFFUSION in served else None
            told = (await watching.read()).status
            assert told == (wanted or health_pb2.HealthCheckResponse.NOT_SERVING)
        watching.cancel()


async def test_two_servers_share_a_port(cells: ScriptedCells) -> None:
    async with grpc_server(generation(cells)) as (address, first):
        from cluster.faces.grpc.service import GrpcServer

        second = GrpcServer(generation(cells), "127.0.0.1", first.port)
        await second.start()
        async with grpc.aio.insecure_channel(address) as channel:
            assert (await Stub(channel).GetModelInfo(pb.GetModelInfoRequest())).model_name == "fake"
        await second.stop(0)
