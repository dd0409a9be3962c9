"""Fields that vLLM has and OpenAI has not: stop strings that are kept, ids of prompts, tokens named by their ids."""

from typing import Any

import httpx
import pytest

from tests.cluster.fakes import ScriptedCells, tokens
from tests.cluster.test_http import TEXT, complete, events_of
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1.generation_pb2_grpc import GenerationServiceStub as Stub

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


async def chat(http: httpx.AsyncClient, **fields: object) -> httpx.Response:
    return await http.post("/v1/chat/completions", json=CHAT | fields)


def text_of(response: httpx.Response, stream: bool) -> str:
    choices = [event["choices"][0] for event in (events_of(response.text)[:-1] if stream else [response.json()])]
    parts = (c.get("text", (c.get("message") or c.get("delta") or {}).get("content", "")) for c in choices)
    return "".join(parts)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [complete, chat])
async def test_a_stop_string_is_kept_where_it_is_wanted(http: httpx.AsyncClient, ask: Any, stream: bool) -> None:
    for kept, text in ((True, "All good things"), (False, "All good ")):
        response = await ask(http, stop=["zzz", "things"], include_stop_str_in_output=kept, stream=stream)
        assert text_of(response, stream) == text


async def test_nothing_behind_the_stop_string_is_told(http: httpx.AsyncClient) -> None:
    """Blocks are of 4 tokens, and the string ends within one."""
    body = (await complete(http, stop=["oo", "ood t"], include_stop_str_in_output=True)).json()
    assert body["choices"][0]["text"] == "All goo" and tuple(body["choices"][0]["token_ids"]) == tokens("All goo")


async def test_over_grpc(stub: Stub) -> None:
    kept = await stub.Generate(pb.GenerateRequest(text="Hi", stop=["things"], include_stop_str_in_output=True))
    cut = await stub.Generate(pb.GenerateRequest(text="Hi", stop=["things"]))
    assert (kept.text, cut.text) == ("All good things", "All good ") and kept.token_ids == cut.token_ids


async def test_the_ids_of_a_completion(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    [choice] = (await complete(http, return_token_ids=True, max_tokens=6)).json()["choices"]
    assert choice["prompt_token_ids"] == [1, *tokens("Hi")] and choice["token_ids"] == [*tokens(TEXT[:6])]
    first, second, done = events_of((await complete(http, return_token_ids=True, max_tokens=6, stream=True)).text)
    assert first["choices"][0]["prompt_token_ids"] == [1, *tokens("Hi")] and done == "[DONE]"
    assert "prompt_token_ids" not in second["choices"][0] and second["choices"][0]["token_ids"] == [*tokens(TEXT[4:6])]
    assert "prompt_token_ids" not in (await complete(http)).text


async def test_the_ids_of_a_chat(http: httpx.AsyncClient) -> None:
    prompt = [*tokens("u: Hi\na:")]
    body = (await chat(http, return_token_ids=True, max_tokens=6, logprobs=True)).json()
    assert body["prompt_token_ids"] == prompt and body["choices"][0]["token_ids"] == [*tokens(TEXT[:6])]
    assert len(body["choices"][0]["logprobs"]["content"]) == 6
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = await chat(http, return_token_ids=True, max_tokens=6, stream=True, stream_options=options)
    first, *events = events_of(streamed.text)[:-2]
    assert first["prompt_token_ids"] == prompt and all("prompt_token_ids" not in event for event in events)
    assert [t for event in events for t in event["choices"][0]["token_ids"]] == [*tokens(TEXT[:6])]
    assert [event["usage"]["completion_tokens"] for event in (first, *events)] == [0, 4, 6, 6]
    assert "token_ids" not in (await chat(http)).text


async def test_tokens_named_by_their_ids(http: httpx.AsyncClient) -> None:
    fields = {"return_tokens_as_token_ids": True, "max_tokens": 1}
    [choice] = (await complete(http, logprobs=1, **fields)).json()["choices"]
    token = tokens("A")[0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}"]
    assert choice["logprobs"]["top_logprobs"] == [{f"token_id:{token}": -token / 100, "token_id:4": -0.04}]
    [choice] = (await chat(http, logprobs=True, top_logprobs=1, **fields)).json()["choices"]
    [told] = choice["logprobs"]["content"]
    assert (told["token"], told["bytes"]) == (f"token_id:{token}", None)
    assert [top["token"] for top in told["top_logprobs"]] == ["token_id:4"]
