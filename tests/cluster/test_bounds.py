"""Every bound at its edge: at the bound accepted, one more refused by name, the same over HTTP and gRPC."""

import json
from typing import Any

import grpc
import httpx
import pytest

from cluster.completions import MAX_LABEL, MAX_PROMPTS
from cluster.grpc_messages import ask_of
from tests.cluster.fakes import ScriptedCells
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc
from twotower.strict_json import MAX_NAMES
from twotower.validation import MAX_COUNT, MAX_SEED, MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

LONGEST = 256  # max_sequence_length of the fake, whose tokens are bytes
LABEL, STOP = "x" * MAX_LABEL, "x" * MAX_STOP_CHARACTERS

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
    ("user", {"user": LABEL}, {"user": LABEL + "x"}, "user", "513 characters, wanted at most 512"),
    ("request_id", {"request_id": "r" * 128}, {"request_id": "r" * 129}, "request_id", "1 to 128 printable"),
    ("seed", {"seed": MAX_SEED}, {"seed": MAX_SEED + 1}, "seed", f"from 0 to {MAX_SEED}"),
    ("top_k", {"top_k": 0}, {"top_k": MAX_COUNT + 1}, "top_k", f"from 0 to {MAX_COUNT}"),
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


async def test_names_of_an_object(http: httpx.AsyncClient) -> None:
    for count, words in ((MAX_NAMES, "unknown field"), (MAX_NAMES + 1, "an object of 513 names, wanted at most 512")):
        body = {f"f{number}": 1 for number in range(count)}
        refused = await http.post("/v1/completions", content=json.dumps(body))
        assert refused.status_code == 400 and words in refused.json()["error"]["message"]


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
]


@pytest.mark.parametrize(("fits", "too_much", "words"), [row[1:] for row in GRPC], ids=[row[0] for row in GRPC])
async def test_over_grpc(
    channel: grpc.aio.Channel, cells: ScriptedCells, fits: pb.GenerateRequest, too_much: pb.GenerateRequest, words: str
) -> None:
    stub: Any = pb_grpc.GenerationServiceStub(channel)
    for request in (fits, too_much):
        request.params.max_new_tokens = 1
    await stub.Generate(fits)
    cells.requests.clear()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(too_much)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and words in caught.value.details()
    assert cells.requests == []


def test_lists_of_a_message_are_not_copied_before_they_are_counted() -> None:
    params = pb.DecodingParams(stop_token_ids=[5])
    ask = ask_of(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), params=params, stop=["a"]), "")
    assert not any(isinstance(value, list | tuple) for value in (ask.prompt, ask.stop, ask.params["stop_token_ids"]))
