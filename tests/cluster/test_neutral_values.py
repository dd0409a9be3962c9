"""Fields of other APIs are taken where they ask for nothing; none of them is ours."""

from typing import Any

import httpx
import pytest

from cluster.faces.http.completion_models import CompletionRequest, StreamOptions
from cluster.faces.http.neutral_values import NEUTRAL
from tests.cluster.fakes import ScriptedCells
from tests.cluster.test_http import events_of


def body_with(name: str, value: object) -> dict[str, Any]:
    outer, dot, inner = name.partition(".")
    return {"prompt": "Hi", "stream": True, outer: {inner: value}} if dot else {"prompt": "Hi", name: value}


@pytest.mark.parametrize("name", NEUTRAL)
async def test_what_asks_for_nothing_is_taken_and_anything_else_is_named(http: httpx.AsyncClient, name: str) -> None:
    for value in (*NEUTRAL[name].values, None):
        response = await http.post("/v1/completions", json=body_with(name, value))
        assert response.status_code == 200, response.text
    for value in (3.5, "something", [1], {"a": 1}):
        error = (await http.post("/v1/completions", json=body_with(name, value))).json()["error"]
        assert error["param"] == name
        assert error["message"].endswith(f"wanted {NEUTRAL[name].wanted}: not supported here")


@pytest.mark.parametrize(("name", "value"), [("n", True), ("store", 0), ("typical_p", False), ("length_penalty", 1.1)])
async def test_what_only_looks_the_same_is_refused(http: httpx.AsyncClient, name: str, value: object) -> None:
    assert (await http.post("/v1/completions", json=body_with(name, value))).status_code == 400


@pytest.mark.parametrize(
    "fields",
    [
        # vLLM's `bench serve`, guidellm, AIPerf, LangChain's OpenAI, as they send them
        {
            "repetition_penalty": 1.0,
            "temperature": 0.0,
            "logprobs": None,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "ignore_eos": True},
        {"min_tokens": 0, "ignore_eos": True, "stream": False},
        {"temperature": 0.7, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "n": 1, "logit_bias": {}},
        {"top_k": -1, "min_p": 0.0, "skip_special_tokens": True, "spaces_between_special_tokens": True},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stream": False, "stream_options": {"include_obfuscation": False}},
    ],
)
async def test_what_known_clients_send_is_taken(http: httpx.AsyncClient, fields: dict[str, object]) -> None:
    response = await http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 8, **fields})
    assert response.status_code == 200, response.text


async def test_continuous_usage_is_on_every_event(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": ["Hi", "Ho"], "max_tokens": 8, "stream": True, "stream_options": options}
    *chunks, last, done = events_of((await http.post("/v1/completions", json=body)).text)
    spent = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert spent == [4, 8, 12, 16] and done == "[DONE]"
    assert chunks[-1]["usage"] == last["usage"] and last["choices"] == []


def test_none_of_them_is_ours() -> None:
    """A field that we have would never be read, if it were listed here."""
    ours = {*CompletionRequest.model_fields, *(f"stream_options.{name}" for name in StreamOptions.model_fields)}
    assert ours.isdisjoint(NEUTRAL)
