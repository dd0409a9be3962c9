"""A wrong request is refused as wrong where there is no room either, and before its text is tokenized. Both faces."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import httpx
import pytest

from cluster.faces.http.service import make_app
from cluster.runs.admission import Admission
from cluster.runs.generation import Generation
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, all_modes, grpc_server, served_model
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc


class Untouched(ByteTokenizer):
    def encode(self, text: str) -> list[int]:
        raise AssertionError("tokenized, though there is no room")


@pytest.fixture
def full() -> Iterator[Generation]:
    """A service that is full, and to which text is only text."""
    service = Generation(served_model(Untouched()), ScriptedCells(), admission=Admission(capacity=1, slots=1))
    with service.hold():
        yield service


@pytest.fixture
async def http(full: Generation) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_app(full, all_modes))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as client:
        yield client


@pytest.fixture
async def stub(full: Generation) -> AsyncIterator[Any]:
    async with grpc_server(full) as (address, _), grpc.aio.insecure_channel(address) as channel:
        yield pb_grpc.GenerationServiceStub(channel)


WRONG_BODIES: list[tuple[str, dict[str, object]]] = [
    ("seed", {"seed": -1}),
    ("temperature", {"temperature": -3}),
    ("stop", {"stop": ["a"] * 17}),
    ("stop_token_ids", {"stop_token_ids": [5] * 65}),
    ("stop_token_ids[0]", {"stop_token_ids": [999]}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 256, "prompt": [5]}),
    ("priority", {"priority": "first"}),
    ("request_id", {"request_id": "a b"}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": "a" * 257}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [5] * 257}),
    ("prompt[1]", {"prompt": [5, 260]}),
    ("prompt[1]", {"prompt": ["Hi", ""]}),
    ("prompt[2][0]", {"prompt": [[5], [5], [-1]]}),
]


@pytest.mark.parametrize(("field", "wrong"), WRONG_BODIES)
async def test_over_http(http: httpx.AsyncClient, field: str, wrong: dict[str, object]) -> None:
    refused = await http.post("/v1/completions", json={"prompt": "Hi", **wrong})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


async def test_what_is_right_waits_for_room(http: httpx.AsyncClient, stub: Any) -> None:
    assert (await http.post("/v1/completions", json={"prompt": "Hi"})).status_code == 429
    for call in (
        stub.Generate(pb.GenerateRequest(text="Hi")),
        stub.GenerateStream(pb.GenerateRequest(text="Hi")).read(),
        stub.Score(pb.ScoreRequest(prompt_text="a", continuation_text="b")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_all_that_is_wrong_is_told_at_once(http: httpx.AsyncClient) -> None:
    body = {"prompt": "a" * 257, "seed": -1, "stop": 5, "priority": 0.5, "request_id": "a b"}
    message = (await http.post("/v1/completions", json=body)).json()["error"]["message"]
    assert all(f"{name}: got" in message for name in body), message


IDS = pb.TokenIds(ids=[5])
WRONG_MESSAGES: list[tuple[str, pb.GenerateRequest | pb.ScoreRequest]] = [
    ("params.seed", pb.GenerateRequest(text="Hi", params=pb.DecodingParams(seed=-1))),
    ("stop", pb.GenerateRequest(text="Hi", stop=["a"] * 17)),
    ("request_id", pb.GenerateRequest(text="Hi", request_id="a b")),
    ("prompt", pb.GenerateRequest(text="a" * 257)),
    ("prompt", pb.GenerateRequest()),
    ("token_ids.ids[0]", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[260]))),
    ("params.max_new_tokens", pb.GenerateRequest(token_ids=IDS, params=pb.DecodingParams(max_new_tokens=256))),
    ("prompt", pb.ScoreRequest(continuation_text="b")),
    ("continuation", pb.ScoreRequest(prompt_text="a", continuation_text="")),
    ("continuation", pb.ScoreRequest(prompt_text="a", continuation_text="b" * 257)),
    ("continuation", pb.ScoreRequest(prompt_token_ids=IDS, continuation_token_ids=pb.TokenIds(ids=[5] * 256))),
    ("prompt_token_ids.ids[0]", pb.ScoreRequest(prompt_token_ids=pb.TokenIds(ids=[260]), continuation_text="b")),
    ("request_id", pb.ScoreRequest(prompt_text="a", continuation_text="b", request_id="a b")),
]


@pytest.mark.parametrize(("field", "wrong"), WRONG_MESSAGES)
async def test_over_grpc(stub: Any, field: str, wrong: pb.GenerateRequest | pb.ScoreRequest) -> None:
    method = stub.Score if isinstance(wrong, pb.ScoreRequest) else stub.Generate
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await method(wrong)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(f"{field}: ")


async def test_parameters_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = list[object]()
    for name in ("parse_params", "parse_stop"):
        module = "twotower.validation" if name == "parse_params" else "twotower.text.tokenizer"
        monkeypatch.setattr(f"{module}.{name}", _noting(f"{module}.{name}", looked))
    service = Generation(served_model(ByteTokenizer()), ScriptedCells())
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(make_app(service, all_modes)), base_url="http://fake"
    ) as client:
        assert (await client.post("/v1/completions", json={"prompt": "Hi", "stop": "x"})).status_code == 200
    assert sorted(map(str, looked)) == ["twotower.text.tokenizer.parse_stop", "twotower.validation.parse_params"]


def _noting(path: str, looked: list[object]) -> Any:
    module, _, name = path.rpartition(".")
    real = getattr(__import__(module, fromlist=[name]), name)

    def noting(*arguments: Any) -> Any:
        looked.append(path)
        return real(*arguments)

    return noting
