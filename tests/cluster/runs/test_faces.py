"""What clients of both faces see of a cell that dies, and of there being none."""

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2

from cluster.faces.http.service import make_app
from cluster.runs.generation import Generation
from cluster.runs.run import Patience
from tests.cluster.fakes import BLOCK, ByteTokenizer, all_modes, grpc_server, served_model
from tests.cluster.runs.script import GONE, WELL, Script, Stay
from tests.cluster.runs.test_run import ANSWER, BLOCKS, TEXT
from tests.cluster.test_grpc import details_of
from tests.cluster.test_http import events_of
from twotower.errors import Unavailable
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

DYING = [Stay(2, GONE), Stay(0, GONE), Stay(1, GONE), WELL]


def _over(script: Script) -> Generation:
    return Generation(served_model(ByteTokenizer()), script, patience=Patience(3, 0.05))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [1, 3])
async def test_http_sees_one_answer(stream: bool, prompts: int) -> None:
    """Each of several prompts of a call goes on by itself."""
    script = Script(ANSWER, [Stay(2, GONE)] * prompts + [WELL])
    transport = httpx.ASGITransport(make_app(_over(script), all_modes))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
        response = await http.post("/v1/completions", json={"prompt": ["Hi"] * prompts, "stream": stream})
    assert response.status_code == 200 and script.open == 0 and len(script.placed) == 2 * prompts
    bodies = events_of(response.text)[:-1] if stream else [response.json()]
    for index in range(prompts):
        choices = [choice for body in bodies for choice in body["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in choices) == TEXT
        assert [token for choice in choices for token in choice["token_ids"]] == list(ANSWER)
    if not stream:
        assert bodies[0]["usage"]["num_blocks"] == prompts * BLOCKS


async def test_grpc_sees_one_answer() -> None:
    async with grpc_server(_over(Script(ANSWER, DYING))) as (address, _), grpc.aio.insecure_channel(address) as channel:
        events = [
            event
            async for event in pb_grpc.GenerationServiceStub(channel).GenerateStream(pb.GenerateRequest(text="Hi"))
        ]
    assert [event.block.start for event in events[:-1]] == list(range(0, len(ANSWER), BLOCK))
    assert "".join(event.block.text for event in events) == TEXT
    assert events[-1].finished.usage.num_blocks == BLOCKS


async def test_what_has_begun_waits_no_longer_for_a_cell_that_mends() -> None:
    """And both faces say when to come again."""
    stays = [Stay(2, GONE), Stay(refuses=Unavailable("this cell is mending"))]
    why = "no cell took this request within 0.05 s: this cell is mending"
    transport = httpx.ASGITransport(make_app(_over(Script(ANSWER, stays)), all_modes))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
        posted = await http.post("/v1/completions", json={"prompt": "Hi", "stream": True})
    *blocks, last = events_of(posted.text)
    assert len(blocks) == 2 and last["error"]["type"] == "unavailable_error" and last["error"]["message"] == why
    service = _over(Script(ANSWER, stays))
    async with grpc_server(service) as (address, _), grpc.aio.insecure_channel(address) as channel:
        call = pb_grpc.GenerationServiceStub(channel).GenerateStream(pb.GenerateRequest(text="Hi"))
        with pytest.raises(grpc.aio.AioRpcError, match=why) as caught:
            async for event in call:
                assert event.HasField("block")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details_of(caught.value, error_details_pb2.RetryInfo) is not None


async def test_where_there_is_no_cell_both_say_when_to_come_again() -> None:
    service = _over(Script(ANSWER, [Stay(refuses=Unavailable("this cell is mending"))]))
    transport = httpx.ASGITransport(make_app(service, all_modes))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
        response = await http.post("/v1/completions", json={"prompt": "Hi", "stream": True})
    assert response.status_code == 503 and response.headers["retry-after"] == "5"
    assert response.json()["error"]["message"].startswith("no cell took this request within 0.05 s")
    async with grpc_server(service) as (address, _), grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.GenerationServiceStub(channel).Generate(pb.GenerateRequest(text="Hi"))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details_of(caught.value, error_details_pb2.RetryInfo) is not None
