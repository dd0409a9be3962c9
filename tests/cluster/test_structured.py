"""Structured output over both faces: each spelling arrives, and what is wrong is told before a cell hears of it."""

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

import twotower
from cluster.config import ServiceConfig
from cluster.faces.http.completions import parse_call
from cluster.faces.http.service import make_app
from cluster.runs.generation import Generation
from cluster.runs.served_model import load_served_model
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, all_modes, grpc_server, served_model
from twotower.core import MAX_CONSTRAINT_BYTES, Mode
from twotower.errors import InvalidRequest
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc
from twotower.text.grammars import Grammars

DEMO = Path(twotower.__file__).parent / "demo" / "checkpoint"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
AR = {"prompt": "Hi", "diffusion": {"mode": "ar"}}


def _service(cells: ScriptedCells) -> Generation:
    grammars = Grammars(DEMO, 512, 2)
    return Generation(replace(served_model(ByteTokenizer()), grammars=grammars), cells)


@pytest.fixture
async def able(cells: ScriptedCells) -> AsyncGenerator[httpx.AsyncClient, None]:
    transport = httpx.ASGITransport(make_app(_service(cells), all_modes, max_bytes=100_000))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as client:
        yield client


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_regex": "a+", "response_format": {"type": "text"}}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"], "guided_json": None}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"structured_outputs": {"regex": "a"}, "response_format": None}, {"regex": "a"}),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "structured_outputs": None}, None),
    ],
)
def test_every_spelling_is_one_parameter(fields: dict[str, Any], wanted: object) -> None:
    assert parse_call({**AR, **fields}).asks[0].params.get("structured_outputs") == wanted


@pytest.mark.parametrize(
    ("fields", "name", "words"),
    [
        (
            {"response_format": {"type": "xml"}},
            "response_format",
            "wanted an object whose type is text, json_object or",
        ),
        ({"response_format": "json"}, "response_format", "wanted an object whose type is text, json_object or"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "wanted an object json_schema with a schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "grammar": "a"}}},
            "response_format",
            "got a json_schema with ['grammar'], wanted name and schema",
        ),
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex", "got it beside guided_json, wanted one of them"),
        (
            {"structured_outputs": {"regex": "a"}, "guided_regex": "a"},
            "guided_regex",
            "got it beside structured_outputs",
        ),
    ],
)
def test_what_is_none_of_them_is_told_by_its_name(fields: dict[str, Any], name: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_call({**AR, **fields})
    [problem] = caught.value.problems
    assert problem.field == name and words in problem.message


async def test_a_good_one_reaches_the_cells_and_a_bad_one_does_not(
    able: httpx.AsyncClient, cells: ScriptedCells
) -> None:
    assert (await able.post("/v1/completions", json={**AR, "guided_regex": "[a-z]+"})).status_code == 200
    [request] = cells.requests
    assert request.params.structured_outputs == ("regex", "[a-z]+")
    for schema, words in (({"type": "objec"}, "json: Invalid type: objec"), ({"not": {}}, "json: Unimplemented keys")):
        body = {**AR, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
        response = await able.post("/v1/completions", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "structured_outputs") and words in error["message"]
    assert len(cells.requests) == 1


async def test_over_grpc(cells: ScriptedCells) -> None:
    async with grpc_server(_service(cells)) as (address, _), grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        params = pb.DecodingParams(mode="MODE_AR", structured_outputs=pb.StructuredOutputs(regex="(a"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(text="Hi", params=params))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "params.structured_outputs: regex: " in str(caught.value.details()) and not cells.requests
        params.structured_outputs.json = '{"type": "object"}'
        await stub.Generate(pb.GenerateRequest(text="Hi", params=params))
        assert len(cells.requests) == 1


@pytest.mark.parametrize("mode", [*Mode, "auto with floor confidence"])
async def test_every_mode_takes_it(able: httpx.AsyncClient, cells: ScriptedCells, mode: str) -> None:
    name, *floor = mode.split(" with floor ")
    chosen = {"mode": name, **({"floor": floor[0]} if floor else {})}
    response = await able.post("/v1/completions", json={**AR, "guided_regex": "a", "diffusion": chosen})
    assert response.status_code == 200, response.text
    [request] = cells.requests
    assert request.params.structured_outputs == ("regex", "a") and request.params.mode == name


async def test_its_size_at_the_edge(able: httpx.AsyncClient) -> None:
    """Over HTTP a text, over gRPC (`tests/cluster/test_bounds.py`) the bytes of `params`."""
    for size, status in ((MAX_CONSTRAINT_BYTES, 200), (MAX_CONSTRAINT_BYTES + 1, 400)):
        response = await able.post("/v1/completions", json={**AR, "guided_regex": "a" * size})
        assert response.status_code == status, response.text
    assert "got 32769 bytes of regex, wanted at most 32768" in response.text


@pytest.mark.parametrize(
    ("fields", "name", "words"),
    [
        ({"ignore_eos": True}, "ignore_eos", "got True, but where structured_outputs ends, the answer does"),
        ({"min_tokens": 3}, "min_tokens", "got 3, but where structured_outputs ends, the answer does"),
    ],
)
async def test_what_does_not_go_with_it(able: httpx.AsyncClient, fields: dict[str, Any], name: str, words: str) -> None:
    error = (await able.post("/v1/completions", json={**AR, "guided_regex": "a", **fields})).json()["error"]
    assert error["param"] == name and words in error["message"]


async def test_a_service_without_a_tokenizer_says_so(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    error = (await http.post("/v1/completions", json={**AR, "guided_regex": "a"})).json()["error"]
    assert "structured_outputs: not served here: there is no tokenizer" in error["message"] and not cells.requests


def test_a_router_reads_the_tokenizer_before_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = list[Grammars]()
    monkeypatch.setattr(Grammars, "prepare", lambda self: ready.append(self))
    assert load_served_model(ServiceConfig.parse({})).grammars in ready
