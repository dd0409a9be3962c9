"""Every bound at its edge: at the bound accepted, one more refused by name, the same over HTTP and gRPC."""

import gzip
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from typing import Any
from unittest import mock

import grpc
import httpx
import pytest

from cluster.faces.grpc.asked import asked_of
from cluster.faces.grpc.strict_protobuf import MAX_FIELDS, MAX_PARAMS, parse_message
from cluster.faces.http.completion_models import MAX_LABEL
from cluster.faces.http.request_head import MAX_HEAD
from cluster.faces.http.service import make_app
from cluster.runs.choices import MAX_PROMPTS
from cluster.runs.generation import Generation
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, all_modes, generation, grpc_server, served_model
from twotower.core import (
    MAX_ALTERNATIVES,
    MAX_COUNT,
    MAX_PRIORITY,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MIN_PRIORITY,
)
from twotower.errors import InvalidRequest
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc
from twotower.strict_json import MAX_NAMES
from twotower.validation import check_likelihoods

LONGEST = 256  # max_sequence_length of the fake, whose tokens are bytes
LABEL, STOP = "x" * MAX_LABEL, "x" * MAX_STOP_CHARACTERS

AR = {"diffusion": {"mode": "ar"}}

HTTP: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    ("prompts", {"prompt": ["a"] * MAX_PROMPTS}, {"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt", "257 prompts"),
    (
        "ids",
        {"prompt": [5] * (LONGEST - 1)},
        {"prompt": [5] * (LONGEST + 1)},
        "prompt",
        "of 257 tokens, wanted at most 256",
    ),
    ("bytes", {"prompt": "a" * (LONGEST - 2)}, {"prompt": "a" * (LONGEST + 1)}, "prompt", "257 bytes of text"),
    ("stop", {"stop": ["a"] * MAX_STOP_STRINGS}, {"stop": ["a"] * (MAX_STOP_STRINGS + 1)}, "stop", "17 strings"),
    ("stop string", {"stop": STOP}, {"stop": STOP + "x"}, "stop", "257 characters, wanted at most 256"),
    (
        "stop ids",
        {"stop_token_ids": [5] * MAX_STOP_TOKEN_IDS},
        {"stop_token_ids": [5] * 65},
        "stop_token_ids",
        "65 token",
    ),
    (
        "biased tokens",
        {"logit_bias": {str(token): 1 for token in range(200)}} | AR,  # of a vocabulary of 260
        {"logit_bias": {str(token): 1 for token in range(MAX_NAMES + 1)}} | AR,
        "body",
        "513 names",
    ),
    ("bias", {"logit_bias": {"5": -100}} | AR, {"logit_bias": {"5": -100.5}} | AR, "logit_bias", "in [-100, 100]"),
    ("user", {"user": LABEL}, {"user": LABEL + "x"}, "user", "513 characters, wanted at most 512"),
    ("request_id", {"request_id": "r" * 128}, {"request_id": "r" * 129}, "request_id", "1 to 128 printable"),
    ("seed", {"seed": MAX_SEED}, {"seed": MAX_SEED + 1}, "seed", f"from 0 to {MAX_SEED}"),
    ("smallest seed", {"seed": 0}, {"seed": -1}, "seed", f"from 0 to {MAX_SEED}"),
    ("top_k", {"top_k": MAX_COUNT} | AR, {"top_k": MAX_COUNT + 1} | AR, "top_k", f"from 0 to {MAX_COUNT}"),
    ("smallest top_k", {"top_k": -1}, {"top_k": -2}, "top_k", f"from 0 to {MAX_COUNT}"),  # -1: off, as 0
    ("fewest new tokens", {"max_tokens": 1}, {"max_tokens": 0}, "max_tokens", "an integer from 1"),
    (
        "prompt and new tokens",
        {"prompt": [5] * 200, "max_tokens": 56},
        {"prompt": [5] * 200, "max_tokens": 57},
        "max_tokens",
        "got 57 after a prompt of 200 tokens (257 together), wanted at most 256 together",
    ),
    ("logprobs", {"logprobs": MAX_ALTERNATIVES}, {"logprobs": MAX_ALTERNATIVES + 1}, "logprobs", "from 0 to 20"),
    ("priority", {"priority": MAX_PRIORITY}, {"priority": MAX_PRIORITY + 1}, "priority", f"to {MAX_PRIORITY}"),
    ("lowest priority", {"priority": MIN_PRIORITY}, {"priority": MIN_PRIORITY - 1}, "priority", f"from {MIN_PRIORITY}"),
]


@pytest.mark.parametrize(
    ("fits", "too_much", "param", "words"), [row[1:] for row in HTTP], ids=[row[0] for row in HTTP]
)
async def test_over_http(
    http: httpx.AsyncClient,
    cells: ScriptedCells,
    fits: dict[str, Any],
    too_much: dict[str, Any],
    param: str,
    words: str,
) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    assert (await http.post("/v1/completions", json=body | fits)).status_code == 200
    cells.requests.clear()
    refused = await http.post("/v1/completions", json=body | too_much)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == param and words in error["message"], error
    assert cells.requests == []


@pytest.mark.parametrize(("over", "status"), [(0, 200), (1, 431)])
async def test_bytes_of_path_and_headers(http: httpx.AsyncClient, cells: ScriptedCells, over: int, status: int) -> None:
    """Whatever they are named, and whoever asks: without a key, too."""
    request = http.build_request("POST", "/v1/completions", json={"prompt": "a"}, headers={"x-long": ""})
    size = len(request.url.raw_path) + sum(len(name) + len(value) for name, value in request.headers.raw)
    request.headers["x-long"] = "a" * (MAX_HEAD - size + over)
    answer = await http.send(request)
    assert answer.status_code == status and len(cells.requests) == 1 - over
    if over:
        error = answer.json()["error"]
        assert error["param"] == "headers" and "got 65537 bytes of path, query and headers" in error["message"]


async def test_bytes_of_metadata(channel: grpc.aio.Channel, cells: ScriptedCells) -> None:
    """gRPC's own bound: between 8 and 16 KiB it refuses more of them the longer they are, above that all."""
    stub: Any = pb_grpc.GenerationServiceStub(channel)
    await stub.Generate(params(), metadata=[("x-long", "a" * 7_000)])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(params(), metadata=[("x-long", "a" * 17_000)])
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and len(cells.requests) == 1
    await stub.Generate(params())


MOST = 10_000  # max_request_bytes of the fixture


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("sized", [True, False])
async def test_bytes_of_a_body(http: httpx.AsyncClient, encoding: str, sized: bool) -> None:
    """Whether the client says how many there are, or only sends them; before and after decoding."""
    for size, status in ((MOST, 200), (MOST + 1, 400)):
        body = json.dumps({"prompt": "a", "max_tokens": 1}).encode().ljust(size)
        sent = gzip.compress(body) if encoding == "gzip" else body
        content = sent if sized else piecewise(sent)
        answer = await http.post("/v1/completions", content=content, headers={"content-encoding": encoding})
        assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == "body" and f"got more than {MOST} bytes" in error["message"]


async def piecewise(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 1000):
        yield body[start : start + 1000]


@pytest.mark.parametrize("over", [0, 1])
async def test_bytes_of_a_message(cells: ScriptedCells, over: int) -> None:
    """gRPC itself refuses what is above."""
    request = params(200)
    size = request.ByteSize()
    async with (
        grpc_server(generation(cells), size - over) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        call = pb_grpc.GenerationServiceStub(channel).Generate(request)
        if not over:
            assert (await call).token_ids
            return
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"larger than max ({size} vs. {size - 1})" in caught.value.details()


async def test_characters_of_the_models_name(cells: ScriptedCells) -> None:
    named = replace(served_model(ByteTokenizer()), name=LABEL)
    transport = httpx.ASGITransport(make_app(Generation(named, cells), all_modes))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
        assert (await http.post("/v1/completions", json={"prompt": "a", "model": LABEL})).status_code == 200
        refused = await http.post("/v1/completions", json={"prompt": "a", "model": LABEL + "x"})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "model")
    assert error["message"] == "model: got a string of 513 characters, wanted at most 512"


@pytest.fixture
def roomy(cells: ScriptedCells) -> Generation:
    """A model whose sequences are longer than any number of new tokens that may be asked for."""
    model = served_model(ByteTokenizer())
    return Generation(replace(model, limits=replace(model.limits, max_sequence_length=2 * MAX_COUNT)), cells)


async def test_most_new_tokens_over_http(roomy: Generation, cells: ScriptedCells) -> None:
    transport = httpx.ASGITransport(make_app(roomy, all_modes))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
        taken = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": MAX_COUNT})
        refused = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": MAX_COUNT + 1})
    assert taken.status_code == 200 and cells.requests[-1].params.max_new_tokens == MAX_COUNT
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "max_tokens") and f"from 1 to {MAX_COUNT}" in error["message"]


async def test_most_new_tokens_over_grpc(roomy: Generation, cells: ScriptedCells) -> None:
    async with grpc_server(roomy) as (address, _), grpc.aio.insecure_channel(address) as channel:
        stub: Any = pb_grpc.GenerationServiceStub(channel)
        await stub.Generate(params(max_new_tokens=MAX_COUNT))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(params(max_new_tokens=MAX_COUNT + 1))
    assert cells.requests[-1].params.max_new_tokens == MAX_COUNT and len(cells.requests) == 1
    assert caught.value.details().startswith("params.max_new_tokens: ")
    assert f"from 1 to {MAX_COUNT}" in caught.value.details()


async def test_names_of_an_object(http: httpx.AsyncClient) -> None:
    for count, words in ((MAX_NAMES, "unknown field"), (MAX_NAMES + 1, "an object of 513 names, wanted at most 512")):
        body = {f"f{number}": 1 for number in range(count)}
        refused = await http.post("/v1/completions", content=json.dumps(body))
        assert refused.status_code == 400 and words in refused.json()["error"]["message"]


def params(prompt: int = 1, **values: Any) -> pb.GenerateRequest:
    """A request of so many tokens, with these parameters and max_new_tokens 1."""
    given = pb.DecodingParams(**{"max_new_tokens": 1, **values})
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * prompt), params=given)


GRPC: list[tuple[str, pb.GenerateRequest, pb.GenerateRequest, str]] = [
    (
        "ids",
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * (LONGEST - 1))),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * (LONGEST + 1))),
        "prompt: got a prompt of 257 tokens, wanted at most 256",
    ),
    (
        "bytes",
        pb.GenerateRequest(text="a" * (LONGEST - 2)),
        pb.GenerateRequest(text="a" * (LONGEST + 1)),
        "prompt: got 257 bytes of text, wanted at most 256",
    ),
    (
        "stop",
        pb.GenerateRequest(text="a", stop=["a"] * MAX_STOP_STRINGS),
        pb.GenerateRequest(text="a", stop=["a"] * (MAX_STOP_STRINGS + 1)),
        "stop: got 17 strings, wanted at most 16",
    ),
    (
        "stop string beside an empty one",
        pb.GenerateRequest(text="a", stop=[STOP]),
        pb.GenerateRequest(text="a", stop=["", STOP * 1000]),
        "stop: got a string of 256000 characters, wanted at most 256",
    ),
    (
        "stop ids",
        pb.GenerateRequest(text="a", params=pb.DecodingParams(stop_token_ids=[5] * MAX_STOP_TOKEN_IDS)),
        pb.GenerateRequest(text="a", params=pb.DecodingParams(stop_token_ids=[5] * (MAX_STOP_TOKEN_IDS + 1))),
        "params.stop_token_ids: got 65 token ids, wanted at most 64",
    ),
    (
        "biased tokens",
        pb.GenerateRequest(text="a", params=pb.DecodingParams(mode="MODE_AR", logit_bias={5: 100})),
        pb.GenerateRequest(text="a", params=pb.DecodingParams(mode="MODE_AR", logit_bias=dict.fromkeys(range(513), 1))),
        "params.logit_bias: got 513 token ids, wanted at most 512",
    ),
    (
        "stop string",
        pb.GenerateRequest(text="a", stop=[STOP] * MAX_STOP_STRINGS),
        pb.GenerateRequest(text="a", stop=[STOP + "x"]),
        "stop: got a string of 257 characters, wanted at most 256",
    ),
    (
        "request_id",
        pb.GenerateRequest(text="a", request_id="r" * 128),
        pb.GenerateRequest(text="a", request_id="r" * 129),
        "request_id: got 'rrr",
    ),
    (
        "seed",
        params(seed=MAX_SEED),
        params(seed=-MAX_SEED),
        f"wanted an integer from 0 to {MAX_SEED}",
    ),  # int64 ends there
    ("smallest seed", params(seed=0), params(seed=-1), f"params.seed: got -1, wanted an integer from 0 to {MAX_SEED}"),
    (
        "top_k",
        params(mode=pb.MODE_AR, top_k=MAX_COUNT),
        params(mode=pb.MODE_AR, top_k=MAX_COUNT + 1),
        f"params.top_k: got {MAX_COUNT + 1}, wanted an integer from 0 to {MAX_COUNT}",
    ),
    ("smallest top_k", params(top_k=0), params(top_k=-1), "params.top_k: got -1, wanted an integer from 0"),
    ("fewest new tokens", params(), params(max_new_tokens=0), "params.max_new_tokens: got 0, wanted an integer from 1"),
    (
        "prompt and new tokens",
        params(200, max_new_tokens=56),
        params(200, max_new_tokens=57),
        "params.max_new_tokens: got 57 after a prompt of 200 tokens (257 together), wanted at most 256 together",
    ),
    (
        "logprobs",
        pb.GenerateRequest(text="a", logprobs=MAX_ALTERNATIVES),
        pb.GenerateRequest(text="a", logprobs=MAX_ALTERNATIVES + 1),
        "logprobs: got 21, wanted an integer from 0 to 20",
    ),
    (
        "priority",
        pb.GenerateRequest(text="a", priority=MAX_PRIORITY),
        pb.GenerateRequest(text="a", priority=MAX_PRIORITY + 1),
        f"priority: got {MAX_PRIORITY + 1}, wanted an integer from {MIN_PRIORITY} to {MAX_PRIORITY}",
    ),
]


@pytest.mark.parametrize(("fits", "too_much", "words"), [row[1:] for row in GRPC], ids=[row[0] for row in GRPC])
async def test_over_grpc(
    channel: grpc.aio.Channel, cells: ScriptedCells, fits: pb.GenerateRequest, too_much: pb.GenerateRequest, words: str
) -> None:
    stub: Any = pb_grpc.GenerationServiceStub(channel)
    for request in (fits, too_much):
        if not request.params.HasField("max_new_tokens"):
            request.params.max_new_tokens = 1
    await stub.Generate(fits)
    cells.requests.clear()
    await _is_refused(stub.Generate(too_much), words)
    assert cells.requests == []


async def _is_refused(call: Any, words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and words in caught.value.details()


WIRE_STOP, WIRE_IDS, WIRE_PARAMS = b"\x2a\x01a", b"\x1a", b"\x22"


def sized(field: bytes, size: int) -> bytes:
    """A field of so many bytes, which are a `size` of unknown little fields."""
    return field + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + b"\x78\x00" * (size // 2)


@pytest.mark.parametrize(
    ("data", "one_more", "words"),
    [
        (WIRE_STOP * MAX_FIELDS, WIRE_STOP * 65, "message: got more than 64 fields; stop is one of those above"),
        (b"\x78\x00" * MAX_FIELDS, b"\x78\x00" * 65, "message: got more than 64 fields; 15 is one of those above"),
        (
            sized(WIRE_IDS, 6 * LONGEST),
            sized(WIRE_IDS, 6 * LONGEST + 2),
            "token_ids: got 1538 bytes, wanted at most 1536: 256 tokens of no more than 6 bytes",
        ),
        (
            sized(WIRE_PARAMS, MAX_PARAMS),
            sized(WIRE_PARAMS, MAX_PARAMS + 2),
            f"params: got {MAX_PARAMS + 2} bytes, wanted at most {MAX_PARAMS}",
        ),
    ],
)
def test_sizes_on_the_wire_are_looked_at_before_protobuf_reads(data: bytes, one_more: bytes, words: str) -> None:
    kind = mock.Mock(wraps=pb.GenerateRequest, DESCRIPTOR=pb.GenerateRequest.DESCRIPTOR)
    with suppress(InvalidRequest):
        parse_message(kind, data, LONGEST)
    assert kind.FromString.called
    kind.reset_mock()
    with pytest.raises(InvalidRequest, match=re.escape(words)):
        parse_message(kind, one_more, LONGEST)
    assert not kind.FromString.called


@pytest.mark.parametrize(
    "tail", [b"", b"\xff", b"\xff" * 20, b"\x0b", b"\x2a\x7f", b"\x2a\xff\xff\xff\xff\xff\xff\xff\x7f"]
)
def test_what_makes_no_sense_on_the_wire_is_left_to_protobuf(tail: bytes) -> None:
    kind = mock.Mock(wraps=pb.GenerateRequest, DESCRIPTOR=pb.GenerateRequest.DESCRIPTOR)
    with suppress(InvalidRequest):
        parse_message(kind, WIRE_STOP + tail, LONGEST)
    assert kind.FromString.called


def ids(count: int) -> pb.TokenIds:
    return pb.TokenIds(ids=[5] * count)


SCORES: list[tuple[str, pb.ScoreRequest, pb.ScoreRequest, str]] = [
    (
        "prompt and continuation",
        pb.ScoreRequest(prompt_token_ids=ids(1), continuation_token_ids=ids(LONGEST - 1)),
        pb.ScoreRequest(prompt_token_ids=ids(1), continuation_token_ids=ids(LONGEST)),
        "continuation: got a prompt of 1 tokens and a continuation of 256 (257 together), wanted at most 256 together",
    ),
    (
        "ids of a continuation",
        pb.ScoreRequest(prompt_token_ids=ids(1), continuation_token_ids=ids(1)),
        pb.ScoreRequest(prompt_token_ids=ids(1), continuation_token_ids=ids(LONGEST + 1)),
        "continuation: got a continuation of 257 tokens, wanted at most 256",
    ),
    (
        "bytes of a continuation",
        pb.ScoreRequest(prompt_token_ids=ids(1), continuation_text="a" * (LONGEST - 1)),
        pb.ScoreRequest(prompt_token_ids=ids(1), continuation_text="a" * (LONGEST + 1)),
        "continuation: got 257 bytes of text, wanted at most 256",
    ),
    (
        "text of a continuation",
        pb.ScoreRequest(prompt_text="a", continuation_text="a" * (LONGEST - 2)),
        pb.ScoreRequest(prompt_text="a", continuation_text="a" * (LONGEST - 1)),
        "continuation: got a prompt of 2 tokens and a continuation of 255 (257 together), wanted at most 256 together",
    ),
    (
        "least",
        pb.ScoreRequest(prompt_token_ids=ids(1), continuation_token_ids=ids(1)),
        pb.ScoreRequest(prompt_token_ids=ids(1), continuation_token_ids=ids(0)),
        "continuation: got an empty continuation, wanted at least one token",
    ),
]


@pytest.mark.parametrize(("fits", "too_much", "words"), [row[1:] for row in SCORES], ids=[row[0] for row in SCORES])
async def test_scores(
    channel: grpc.aio.Channel, cells: ScriptedCells, fits: pb.ScoreRequest, too_much: pb.ScoreRequest, words: str
) -> None:
    stub: Any = pb_grpc.GenerationServiceStub(channel)
    await stub.Score(fits)
    cells.scored.clear()
    await _is_refused(stub.Score(too_much), words)
    assert cells.scored == []


def test_lists_of_a_message_are_not_copied_before_they_are_counted() -> None:
    params = pb.DecodingParams(stop_token_ids=[5])
    ask = asked_of(
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), params=params, stop=["a"]), "", "id", streams=False
    ).ask
    assert not any(isinstance(value, list | tuple) for value in (ask.prompt, ask.stop, ask.params["stop_token_ids"]))


async def test_log_probabilities_of_a_call() -> None:
    """Of all its prompts together: none of them alone is too many."""
    cells, model = ScriptedCells(), served_model(ByteTokenizer())
    long = replace(model, limits=replace(model.limits, max_sequence_length=4096))
    transport = httpx.ASGITransport(make_app(Generation(long, cells, at_once=64), all_modes))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
        for prompts, status in ((4, 200), (5, 400)):
            body = {"prompt": [[5]] * prompts, "max_tokens": 3120, "logprobs": 20}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == status, answer.text
        assert answer.json()["error"]["param"] == "logprobs" and "wanted at most 262144" in answer.text
        echoed = {"prompt": [5] * 4000, "max_tokens": 0, "echo": True, "logprobs": 20}
        assert (await http.post("/v1/completions", json=echoed)).status_code == 200
        assert len(cells.scored) == 1
    for tokens, alternatives in ((2**18, 0), (12_483, 20)):
        check_likelihoods(tokens, alternatives)
        with pytest.raises(InvalidRequest, match="logprobs: got"):
            check_likelihoods(tokens + 1, alternatives)
