"""/docs and /openapi.json: true of what is served, and without anything from elsewhere."""

import re
from typing import Any

import httpx
import jsonschema
import pytest

from cluster.faces.http.description import OPERATIONS
from cluster.faces.http.service import make_app
from tests.cluster.fakes import ScriptedCells, all_modes, generation
from tests.cluster.test_http import events_of

OF_THE_PAGE = {"/docs", "/openapi.json"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


async def described(http: httpx.AsyncClient) -> Any:
    response = await http.get("/openapi.json")
    assert response.status_code == 200
    return response.json()


def check(whole: Any, schema: Any, value: object) -> None:
    """`value` is as the description has it."""
    jsonschema.Draft202012Validator({**schema, "components": whole["components"]}).validate(value)


def test_every_path_is_described() -> None:
    app = make_app(generation(ScriptedCells()), all_modes)
    served = {route.path.replace(":path", "") for route in app.routes} - OF_THE_PAGE  # type: ignore[attr-defined]
    assert served == {operation.path for operation in OPERATIONS}


async def test_every_name_that_is_referred_to_is_there(http: httpx.AsyncClient) -> None:
    whole = await described(http)
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', (await http.get("/openapi.json")).text))
    assert names == whole["components"]["schemas"].keys() and len(names) > 15
    for schema in whole["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hi", "logprobs": 2, "n": 2, "suffix": "", "stream_options": None}),
        ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 1, "tools": [], "max_completion_tokens": 4}),
        ("/v1/completions", {"prompt": [[5], [6]], "return_token_ids": True, "add_special_tokens": False}),
        ("/v1/chat/completions", CHAT | {"return_token_ids": True, "include_stop_str_in_output": True}),
        ("/v1/score", {"prompt": "Hi", "continuation": "there"}),
        ("/v1/score", {"prompt": [5], "continuations": [[5], [6, 7]]}),
        ("/tokenize", {"prompt": "Hi", "return_token_strs": True}),
        ("/tokenize", CHAT),
        ("/detokenize", {"tokens": [5, 6]}),
    ],
)
async def test_bodies_and_answers_are_as_described(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    whole = await described(http)
    operation = whole["paths"][path]["post"]
    given = {name: value for name, value in body.items() if value is not None}  # null counts as not given
    check(whole, operation["requestBody"]["content"]["application/json"]["schema"], given)
    response = await http.post(path, json=body)
    check(whole, operation["responses"]["200"]["content"]["application/json"]["schema"], response.json())
    refused = await http.post(path, json=body | {"nobody_s": 1})
    assert refused.status_code == 400
    check(whole, operation["responses"]["default"]["content"]["application/json"]["schema"], refused.json())
    with pytest.raises(jsonschema.ValidationError):
        check(whole, operation["requestBody"]["content"]["application/json"]["schema"], body | {"nobody_s": 1})


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", {"prompt": "Hi"}), ("/v1/chat/completions", CHAT)])
async def test_events_are_as_described(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    whole = await described(http)
    schema = whole["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    body |= {"stream": True, "return_token_ids": True, "diffusion": {"trace": True}}
    for options in ({}, {"include_usage": True}, {"continuous_usage_stats": True}):
        text = (await http.post(path, json=body | {"stream_options": options})).text
        events = events_of(text.replace("event: twotower.trace\n", ""))[:-1]
        assert {"twotower.trace"} < {event["object"] for event in events}
        for event in events:
            check_event(whole, schema, event)


def check_event(whole: Any, schema: Any, event: Any) -> None:
    """By its own kind's part of the schema, so that a wrong one is told well."""
    if event["object"] == "twotower.trace":
        name = "Trace"
    else:
        name = ("ChatChunk" if "chat" in event["object"] else "Completion") + ("AndUsage" if "usage" in event else "")
    [one] = [kind for kind in schema["anyOf"] if kind["$ref"].endswith(f"/{name}")]
    check(whole, one, event)


async def test_the_page_loads_nothing_from_elsewhere(http: httpx.AsyncClient) -> None:
    response = await http.get("/docs")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", response.text)
    assert re.findall(r"(?:href|src)=\"([^\"#]*)", response.text) == ["data:,", "openapi.json"]
    assert "{{" not in response.text
