"""One table of mistakes, made over HTTP and over gRPC: each is named, and the service goes on."""

import json
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2

from cluster.faces.http.service import make_app
from cluster.runs.generation import Generation
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, all_modes, generation, grpc_server, served_model
from tests.cluster.test_grpc import details_of
from twotower.core import DecodingParams, Mode
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

JSON: list[tuple[str, dict[str, Any], str, str]] = [
    ("no prompt", {"prompt": None}, "prompt", "missing"),
    ("empty text", {"prompt": ""}, "prompt", "empty prompt"),
    ("empty ids", {"prompt": []}, "prompt", "empty prompt"),
    ("id too big", {"prompt": [5, 260]}, "prompt[1]", "got 260, wanted a token id from 0 to 259"),
    ("id negative", {"prompt": [-1]}, "prompt[0]", "got -1"),
    ("id a float", {"prompt": [1.5]}, "prompt[0]", "got 1.5"),
    ("id a boolean", {"prompt": [True]}, "prompt[0]", "got True"),
    ("second prompt empty", {"prompt": ["a", ""]}, "prompt[1]", "empty prompt"),
    ("prompt a number", {"prompt": 5}, "prompt", "got 5, wanted a string"),
    ("too many prompts", {"prompt": ["a"] * 257}, "prompt", "257 prompts"),
    ("too long", {"max_tokens": 500}, "max_tokens", "wanted at most 256 together"),
    ("no tokens", {"max_tokens": 0}, "max_tokens", "got 0, wanted an integer from 1"),
    ("tokens as text", {"max_tokens": "5"}, "max_tokens", "got '5', wanted an integer"),
    ("tokens as float", {"max_tokens": 5.0}, "max_tokens", "got 5.0"),
    ("hot", {"temperature": -0.1}, "temperature", "got -0.1"),
    ("infinitely hot", {"temperature": float("1e999")}, "body", "Infinity"),
    ("top_p zero", {"top_p": 0, "diffusion": {"mode": "ar"}}, "top_p", "got 0"),
    ("penalty in diffusion", {"presence_penalty": 1}, "presence_penalty", "not supported in diffusion"),
    ("seed negative", {"seed": -1}, "seed", "got -1"),
    ("gamma above 1", {"diffusion": {"confidence_threshold": 1.1}}, "diffusion.confidence_threshold", "got 1.1"),
    ("no block", {"diffusion": {"block_size": 0}}, "diffusion.block_size", "got 0"),
    ("no steps", {"diffusion": {"steps_per_block": 0}}, "diffusion.steps_per_block", "got 0"),
    ("unknown mode", {"diffusion": {"mode": "magic"}}, "diffusion.mode", "got 'magic', wanted one of diffusion"),
    ("block in ar", {"diffusion": {"mode": "ar", "block_size": 4}}, "diffusion.block_size", "no meaning in ar"),
    ("unknown in diffusion", {"diffusion": {"blocksize": 4}}, "diffusion.blocksize", "did you mean block_size?"),
    ("diffusion a list", {"diffusion": []}, "diffusion", "wanted an object"),
    ("unknown field", {"max_token": 5}, "max_token", "unknown field; did you mean max_tokens?"),
    ("library's name", {"max_new_tokens": 5}, "max_new_tokens", "did you mean max_tokens?"),
    ("mode outside", {"mode": "ar"}, "mode", "did you mean diffusion.mode?"),
    ("n too big", {"n": 257}, "n", "got 257, wanted an integer from 1 to 256"),
    ("n is true", {"n": True}, "n", "got True, wanted an integer"),
    ("logprobs too many", {"logprobs": 21}, "logprobs", "got 21, wanted an integer from 0 to 20"),
    ("logprobs as of chats", {"logprobs": True}, "logprobs", "got True, wanted an integer"),
    ("top_logprobs of chats", {"top_logprobs": 5}, "top_logprobs", "unknown field"),
    ("echo a number", {"echo": 1}, "echo", "wanted true or false"),
    ("nothing without echo", {"max_tokens": 0}, "max_tokens", "got 0, wanted an integer from 1"),
    ("best_of too few", {"n": 3, "best_of": 2}, "best_of", "got 2, wanted at least n, which is 3"),
    ("penalty", {"presence_penalty": 0.5}, "presence_penalty", "not supported"),
    ("logit_bias", {"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ("suffix", {"suffix": "x"}, "suffix", "not supported"),
    ("stop empty", {"stop": ""}, "stop", "none of them empty"),
    ("stop a number", {"stop": 5}, "stop", "got 5"),
    ("stop of numbers", {"stop": [5]}, "stop", "strings"),
    ("stop too many", {"stop": ["a"] * 17}, "stop", "at most 16"),
    ("stop too long", {"stop": "a" * 1025}, "stop", "at most 256"),
    ("stop ids", {"stop_token_ids": ["a"]}, "stop_token_ids[0]", "got 'a', wanted"),
    ("ignore_eos a number", {"ignore_eos": 1}, "ignore_eos", "wanted true or false"),
    ("stream a string", {"stream": "yes"}, "stream", "wanted true or false"),
    ("options alone", {"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
    ("request_id spaced", {"request_id": "a b"}, "request_id", "got 'a b', wanted 1 to 128 printable ASCII"),
    ("request_id false", {"request_id": False}, "request_id", "got False, wanted a string"),
    ("priority a boolean", {"priority": True}, "priority", "got True, wanted an integer from -2147483648"),
    ("priority a float", {"priority": 1.0}, "priority", "got 1.0"),
    ("priority too big", {"priority": 2**31}, "priority", "got 2147483648"),
    ("priority a list", {"priority": [1]}, "priority", "got [1]"),
    ("request_id long", {"request_id": "a" * 129}, "request_id", "1 to 128"),
]

RAW: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "broken JSON"),
    ("cut off", b'{"prompt": "a', "broken JSON"),
    ("not UTF-8", b'{"prompt": "\xff\xfe"}', "not UTF-8"),
    ("half a surrogate", b'{"prompt": "\\ud800"}', "surrogate"),
    ("a list", b"[1, 2]", "got an array, wanted a JSON object"),
    ("a string", b'"hello"', "got a string"),
    ("NaN", b'{"prompt": "a", "temperature": NaN}', "NaN is not a JSON number"),
    ("Infinity", b'{"prompt": "a", "temperature": -Infinity}', "-Infinity is not a JSON number"),
    ("a number too big", b'{"prompt": "a", "temperature": 1e999}', "temperature: got inf"),
    ("endless digits", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "broken JSON"),
    ("a name twice", b'{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
    ("deep", b'{"prompt": ' + b"[" * 4000 + b"]" * 4000 + b"}", ""),
    ("big", b'{"prompt": "' + b"a" * 20_000 + b'"}', "wanted at most that many"),
]

WIRE: list[tuple[str, pb.GenerateRequest, str, str]] = [
    ("no prompt", pb.GenerateRequest(), "prompt", "missing"),
    ("empty text", pb.GenerateRequest(text=""), "prompt", "empty prompt"),
    ("empty ids", pb.GenerateRequest(token_ids=pb.TokenIds()), "prompt", "empty prompt"),
    ("id too big", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 260])), "token_ids.ids[1]", "got 260"),
    ("stop empty", pb.GenerateRequest(text="a", stop=[""]), "stop", "none of them empty"),
    ("priority", pb.GenerateRequest(text="a", priority=2**31), "priority", "got 2147483648, wanted an integer"),
    ("request_id", pb.GenerateRequest(text="a", request_id="a b"), "request_id", "printable ASCII"),
    *[
        (name, pb.GenerateRequest(text="a", params=pb.DecodingParams(**params)), f"params.{field}", words)
        for name, params, field, words in [
            ("too long", {"max_new_tokens": 500}, "max_new_tokens", "wanted at most 256 together"),
            ("no tokens", {"max_new_tokens": 0}, "max_new_tokens", "got 0"),
            ("NaN", {"temperature": float("nan")}, "temperature", "got nan"),
            ("infinite", {"temperature": float("inf")}, "temperature", "got inf"),
            ("gamma", {"confidence_threshold": 1.1}, "confidence_threshold", "got 1.1"),
            ("gamma NaN", {"confidence_threshold": float("nan")}, "confidence_threshold", "got nan"),
            ("no block", {"block_size": 0}, "block_size", "got 0"),
            ("no steps", {"steps_per_block": 0}, "steps_per_block", "got 0"),
            ("unknown mode", {"mode": 99}, "mode", "got 99, wanted one of diffusion"),
            ("min_tokens", {"min_tokens": 5}, "min_tokens", "not supported in diffusion"),
            ("seed", {"seed": -1}, "seed", "got -1"),
            ("stop id", {"stop_token_ids": [2, 260]}, "stop_token_ids[1]", "got 260"),
        ]
    ],
]


async def assert_well(http: httpx.AsyncClient) -> None:
    assert (await http.post("/v1/completions", json={"prompt": "Hi"})).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param", "words"), [row[1:] for row in JSON], ids=[row[0] for row in JSON])
async def test_http_names_the_field(
    http: httpx.AsyncClient, cells: ScriptedCells, fields: dict[str, Any], param: str, words: str, stream: bool
) -> None:
    body = {"prompt": "Hi", "stream": stream, **fields}
    if "stream_options" in fields:
        body["stream"] = False
    response = await http.post("/v1/completions", content=json.dumps(body))
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"] and "\n" not in error["message"]
    assert cells.requests == []
    await assert_well(http)


@pytest.mark.parametrize(("body", "words"), [row[1:] for row in RAW], ids=[row[0] for row in RAW])
async def test_http_refuses_broken_bodies(
    http: httpx.AsyncClient, cells: ScriptedCells, body: bytes, words: str
) -> None:
    response = await http.post("/v1/completions", content=body)
    error = response.json()["error"]
    assert response.status_code == 400 and words in error["message"] and "\n" not in error["message"]
    assert cells.requests == []
    await assert_well(http)


async def test_http_tells_all_problems_at_once(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={"prompt": "a", "store": True, "magic": 1, "suffix": "b"})
    message = response.json()["error"]["message"]
    assert all(name in message for name in ("store: got True", "magic: unknown", "suffix: got 'b'"))


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
@pytest.mark.parametrize(("request_", "field", "words"), [row[1:] for row in WIRE], ids=[row[0] for row in WIRE])
async def test_grpc_names_the_field(
    stub: pb_grpc.GenerationServiceStub,
    cells: ScriptedCells,
    request_: pb.GenerateRequest,
    field: str,
    words: str,
    method: str,
) -> None:
    error = await refusal(stub, method, request_)
    bad = details_of(error, error_details_pb2.BadRequest)
    assert isinstance(bad, error_details_pb2.BadRequest)
    [violation] = bad.field_violations
    assert violation.field == field and words in violation.description
    assert error.details() == f"{violation.field}: {violation.description}"
    assert cells.requests == []
    assert (await stub.Generate(pb.GenerateRequest(text="a"))).text


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xff\xff", "message: not a readable twotower.v1.GenerateRequest"),
        (b"\x12\x02a\xff", "text: not UTF-8: invalid start byte at byte 1"),
        (b"\x12\x01a\x2a\x01b\x2a\x01\xff", "stop: not UTF-8: invalid start byte at byte 0"),
        (b"\x10\x05", "text: wrong type on the wire, wanted string"),
        (b"\x12\x01a\x10\x05\x10\x05", "text: wrong type on the wire, wanted string"),
        (b"\x1a\x04\x09aaaaaaaa", "not a readable"),
        (b"\x1a\x05\x0daaaa", "token_ids.ids: wrong type on the wire, wanted uint32"),
        (b"\x12\x01a\x20\x05", "params: wrong type on the wire, wanted twotower.v1.DecodingParams"),
        (b"\x12\x01a\x22\x02\x0a\x00", "params.mode: wrong type on the wire, wanted twotower.v1.Mode"),
        (b"\x12\x01a\x22\x02\x12\x00", "params.max_new_tokens: wrong type on the wire, wanted int64"),
        (b"\x12\x01a\x22\x02\x28\x01", "params.confidence_threshold: wrong type on the wire, wanted double"),
        (b"\x12\x01a\x10\x05\x98\x06\x01", "text: wrong type on the wire, wanted string"),
    ],
    ids=[
        *["not a message", "not UTF-8", "a stop string that is not UTF-8", "text a varint", "text a varint, twice"],
        *["ids cut off", "ids fixed32", "params a varint", "mode a string", "tokens a string", "gamma a varint"],
        "text a varint, beside an unknown field",
    ],
)
async def test_grpc_refuses_broken_messages(
    channel: grpc.aio.Channel, cells: ScriptedCells, data: bytes, words: str, method: str
) -> None:
    path = f"/twotower.v1.GenerationService/{method}"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if method == "Generate":
            await channel.unary_unary(path)(data)
        else:
            [_ async for _ in channel.unary_stream(path)(data)]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in caught.value.details() and caught.value.details().count(words) == 1
    assert cells.requests == []
    assert (await pb_grpc.GenerationServiceStub(channel).Generate(pb.GenerateRequest(text="a"))).text


async def test_a_mode_that_the_cell_cannot_do_is_refused_over_both_faces(cells: ScriptedCells) -> None:
    """A base checkpoint, or placement ar_only."""
    service = Generation(served_model(ByteTokenizer(), (Mode.AR,), DecodingParams(mode=Mode.AR)), cells)
    transport = httpx.ASGITransport(make_app(service, all_modes))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
        for mode in ("diffusion", "mock_ar"):
            response = await http.post("/v1/completions", json={"prompt": "Hi", "diffusion": {"mode": mode}})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, "diffusion.mode")
            assert f"got '{mode}', wanted a mode this checkpoint can serve (ar)" in error["message"]
        await assert_well(http)
    async with grpc_server(service) as (address, _), grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        for number in (pb.MODE_DIFFUSION, pb.MODE_MOCK_AR):
            for method in ("Generate", "GenerateStream"):
                refused = await refusal(
                    stub, method, pb.GenerateRequest(text="a", params=pb.DecodingParams(mode=number))
                )
                assert "wanted a mode this checkpoint can serve (ar)" in refused.details()
                assert refused.details().startswith("params.mode: got ")
        assert (await stub.Generate(pb.GenerateRequest(text="a"))).text
    assert {request.params.mode for request in cells.requests} == {Mode.AR}


async def test_grpc_refuses_a_message_that_is_too_big(cells: ScriptedCells) -> None:
    async with (
        grpc_server(generation(cells), max_bytes=1000) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = pb_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(text="a" * 2000))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Generate(pb.GenerateRequest(text="a"))).text


async def refusal(
    stub: pb_grpc.GenerationServiceStub, method: str, request: pb.GenerateRequest
) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if method == "Generate":
            await stub.Generate(request)
        else:
            [_ async for _ in stub.GenerateStream(request)]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return caught.value
