"""Chats over HTTP, with OpenAI's own client and by hand, over scripted cells."""

import json
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.faces.http.chat_messages import MAX_MESSAGES, MAX_PARTS, NEUTRAL_OF_MESSAGES, SCHEMA
from cluster.faces.http.chat_models import ChatRequest
from cluster.faces.http.neutral_values import NEUTRAL_IN_CHATS
from cluster.faces.http.service import make_app
from cluster.runs.generation import Generation
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, all_modes, generation, tokens
from tests.cluster.test_http import TEXT, events_of
from twotower.errors import Unavailable

USER = {"role": "user", "content": "Hi"}


@pytest.fixture
async def client(http: httpx.AsyncClient) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    transport = http._transport
    async with openai.AsyncOpenAI(
        base_url="http://fake/v1", api_key="-", http_client=httpx.AsyncClient(transport=transport), max_retries=0
    ) as client:
        yield client


async def ask(http: httpx.AsyncClient, **fields: object) -> httpx.Response:
    return await http.post("/v1/chat/completions", json={"messages": [USER], **fields})


async def test_openais_client_reads_a_whole_answer(client: openai.AsyncOpenAI, cells: ScriptedCells) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": "me"},
    ]
    answer = await client.chat.completions.create(
        model="fake", messages=messages, max_completion_tokens=20, temperature=0, seed=3
    )
    [choice] = answer.choices
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == "fake"
    assert choice.message.role == "assistant" and choice.message.content == TEXT[:20]
    assert choice.finish_reason == "length" and choice.logprobs is None and choice.message.refusal is None
    [request] = cells.requests
    assert request.prompt_token_ids == tokens("s: Be short.\nu: one\ntwo\na:"), "the template writes special tokens"
    assert (request.params.max_new_tokens, request.params.seed) == (20, 3)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.completion_tokens == 20 and answer.usage.to_dict()["mode"] == "diffusion"


async def test_openais_client_reads_a_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "Hi"}], stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    first, *middle, end = [chunk.choices[0] for chunk in chunks]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert "".join(choice.delta.content or "" for choice in middle) == TEXT
    assert {choice.finish_reason for choice in middle} == {None} and not any(choice.delta.role for choice in middle)
    assert (end.delta.content, end.delta.role, end.finish_reason) == (None, None, "stop")
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == len(TEXT)
    assert {chunk.object for chunk in (*chunks, last)} == {"chat.completion.chunk"}


async def test_the_events_are_openais_to_the_field(http: httpx.AsyncClient) -> None:
    first, second, *_, end, done = events_of((await ask(http, stream=True, seed=1)).text)
    about = {"index": 0, "logprobs": None, "seed": 1}
    assert first["choices"] == [{**about, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
    assert second["choices"] == [{**about, "delta": {"content": TEXT[:4]}, "finish_reason": None}]
    assert end["choices"] == [{**about, "delta": {}, "finish_reason": "stop"}] and done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probs_in_the_shape_of_chats(client: openai.AsyncOpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 150, "model": "fake"}
    if stream:
        chunks = await client.chat.completions.create(messages=[USER], stream=True, **fields)  # type: ignore[list-item]
        choices = [chunk.choices[0] async for chunk in chunks]
    else:
        choices = list((await client.chat.completions.create(messages=[USER], **fields)).choices)  # type: ignore
    content = [one for choice in choices if choice.logprobs is not None for one in choice.logprobs.content or ()]
    assert "".join(one.token for one in content) == TEXT
    assert [one.logprob for one in content] == [-token / 100 for token in tokens(TEXT)]
    assert content[0].bytes == list(b"A") and [top.token for top in content[0].top_logprobs] == ["\x00", "\x01"]


async def test_a_long_answer_with_log_probs_has_one_entry_for_each_token() -> None:
    text = 'a "content":[] b ' * 10
    app = make_app(generation(ScriptedCells(text)), all_modes)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fake") as http:
        [choice] = (await ask(http, logprobs=True, max_tokens=200)).json()["choices"]
    assert choice["message"]["content"] == text and len(choice["logprobs"]["content"]) == len(text)
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


async def test_choices_and_trace_in_a_stream(http: httpx.AsyncClient) -> None:
    events = [
        json.loads(line.removeprefix("data: "))
        for line in (await ask(http, stream=True, n=2, max_tokens=8, diffusion={"trace": True})).text.splitlines()
        if line.startswith("data: {")
    ]
    traced = [event for event in events if event["object"] == "twotower.trace"]
    assert {event["index"] for event in traced} == {0, 1} and all(event["choices"] == [] for event in traced)
    for index in (0, 1):
        mine = [e["choices"][0] for e in events if e["choices"] and e["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""} and mine[-1]["delta"] == {}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == TEXT[:8]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text(http: httpx.AsyncClient, stream: bool) -> None:
    body = (await ask(http, stop="things", stream=stream)).text
    if stream:
        choices = [event["choices"][0] for event in events_of(body)[:-1]]
        text, reason = "".join(c["delta"].get("content", "") for c in choices), choices[-1]["finish_reason"]
    else:
        [choice] = json.loads(body)["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == ("All good ", "stop")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "wanted a list of 1 to 1024 messages"),
        ({"messages": "Hi"}, "messages", "wanted a list of 1 to 1024 messages"),
        ({"messages": [USER, "Hi"]}, "messages[1]", "wanted an object"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "messages[0].role", "not supported here"),
        ({"messages": [{"role": "boss", "content": "4"}]}, "messages[0].role", "wanted one of system"),
        ({"messages": [{"content": "4"}]}, "messages[0].role", "got None"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "wanted a string or a list of parts"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "got 5"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "got []"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "got 'image_url', wanted a part of type text: not supported here",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "got 'x'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}]},
            "messages[0].content[0].cache",
            "unknown",
        ),
        ({"messages": [{**USER, "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls", "not supported here"),
        ({"messages": [{**USER, "image": "x"}]}, "messages[0].image", "unknown field"),
        ({"messages": [{**USER, "name": "x" * 513}]}, "messages[0].name", "at most 512 characters"),
        ({"messages": [{**USER, "content": "x" * 257}]}, "messages", "got 263 bytes of text, wanted at most 256"),
        ({"messages": [{**USER, "content": "x" * 252}]}, "messages", "bytes of text"),
        ({"messages": [{**USER, "content": "x" * 248}], "max_tokens": 3}, "max_tokens", "257 together"),
        ({"messages": [{**USER, "content": "x" * 248}], "max_completion_tokens": 3}, "max_completion_tokens", "257"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "from 1"),
        ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens", "wanted one of them"),
        ({"top_logprobs": 2}, "top_logprobs", "only with logprobs: true"),
        ({"logprobs": 2}, "logprobs", "wanted true or false"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported here"),
        ({"prompt": "Hi"}, "prompt", "unknown field"),
        ({"n": 257}, "n", "from 1 to 256"),
    ],
)
async def test_what_is_wrong_is_told_by_name(
    http: httpx.AsyncClient, cells: ScriptedCells, fields: dict[str, Any], param: str, words: str
) -> None:
    refused = await ask(http, **fields)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == param and words in error["message"], error
    assert cells.requests == []


async def test_as_many_messages_as_may_be(cells: ScriptedCells) -> None:
    """A template may leave out most of them: how long they are together does not matter."""
    async with served(generation(cells, template="{{ messages[-1].content }}")) as http:
        long = {"role": "user", "content": "x" * 300}
        assert (await ask(http, messages=[*[long] * (MAX_MESSAGES - 1), USER], max_tokens=1)).status_code == 200
        refused = await ask(http, messages=[USER] * (MAX_MESSAGES + 1))
    assert refused.status_code == 400 and "got 1025 messages, wanted at most 1024" in refused.text
    assert [request.prompt_token_ids for request in cells.requests] == [tokens("Hi")]


async def test_as_many_parts_as_may_be_and_few_of_the_wrong_ones_are_looked_at(cells: ScriptedCells) -> None:
    part = {"type": "text", "text": ""}

    async def said(content: list[object]) -> httpx.Response:
        async with served(generation(cells, template="{{ 'Hi' }}")) as http:
            return await ask(http, messages=[{"role": "user", "content": content}], max_tokens=1)

    assert (await said([part] * MAX_PARTS)).status_code == 200
    refused = (await said([part] * (MAX_PARTS + 1))).json()["error"]["message"]
    assert "messages[0].content: got 1025 parts, wanted at most 1024" in refused
    wrong = (await said([1] * MAX_PARTS)).json()["error"]["message"]
    assert "content[7]" in wrong and "content[8]" not in wrong


async def test_a_template_that_makes_nothing_of_a_chat(cells: ScriptedCells) -> None:
    async with served(generation(cells, template="{{ messages[-1].content }}")) as http:
        refused = await ask(http, messages=[{"role": "user", "content": ""}], add_special_tokens=False)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages", refused.text
        told = await http.post("/tokenize", json={"messages": [{"role": "user", "content": ""}]})
    assert told.json()["tokens"] == [] and cells.requests == []


async def test_a_stream_opens_all_choices_in_order(http: httpx.AsyncClient) -> None:
    """OpenAI's own helper for streams lists choices as it hears of them."""
    events = events_of((await ask(http, stream=True, n=3, max_tokens=4)).text)[:-1]
    opened = [choice for event in events for choice in event["choices"] if choice["delta"].get("role")]
    assert [choice["index"] for choice in opened] == [0, 1, 2] and events[2]["choices"] == [opened[2]]


@pytest.mark.parametrize("name", NEUTRAL_IN_CHATS)
async def test_what_asks_for_nothing_is_taken_and_anything_else_is_named(http: httpx.AsyncClient, name: str) -> None:
    field, (outer, _, inner) = NEUTRAL_IN_CHATS[name], name.partition(".")
    for value in (*field.values, None):
        response = await ask(http, stream=True, **{outer: {inner: value} if inner else value})
        assert response.status_code == 200, response.text
    error = (await ask(http, stream=True, **{outer: {inner: 3.5} if inner else 3.5})).json()["error"]
    assert error["param"] == name and error["message"].endswith("not supported here")


def test_none_of_them_is_ours() -> None:
    assert ChatRequest.model_fields.keys().isdisjoint(NEUTRAL_IN_CHATS)
    assert SCHEMA["items"]["properties"].keys().isdisjoint(NEUTRAL_OF_MESSAGES)


async def test_an_answer_can_be_sent_again(client: openai.AsyncOpenAI, cells: ScriptedCells) -> None:
    """As clients keep a conversation: with all that the answer's message has."""
    answer = await client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}])
    before: Any = answer.choices[0].message.model_dump()
    more: Any = {"role": "assistant", "content": "b", "tool_calls": [], "annotations": [], "refusal": None}
    await client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}, before, more])
    assert cells.requests[-1].prompt_token_ids == tokens(f"u: Hi\na: {TEXT}\na: b\na:")


async def test_without_a_template_it_is_told_what_to_set(cells: ScriptedCells) -> None:
    async with served(generation(cells, template=None)) as http:
        error = (await ask(http)).json()["error"]
        assert error["param"] == "messages" and "set model.chat_template" in error["message"]
        assert (await http.post("/v1/completions", json={"prompt": "Hi"})).status_code == 200


async def test_what_a_template_says_is_told(cells: ScriptedCells) -> None:
    async with served(generation(cells, template="{{ messages[0].content.missing.more }}")) as http:
        refused = await ask(http)
        assert refused.status_code == 400 and "does not take them" in refused.json()["error"]["message"]
    assert cells.requests == []


@pytest.mark.parametrize(("count", "lane"), [(1, "short-lane"), (1000, "long-lane")])
async def test_a_template_is_rendered_beside_the_loop(
    cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch, count: int, lane: str
) -> None:
    """However little it is: nobody knows how long a template takes."""
    threads = list[str]()

    def rendered(self: ByteTokenizer, template: str, messages: object) -> str:
        threads.append(threading.current_thread().name)
        return "Hi"

    service = generation(cells)
    monkeypatch.setattr(ByteTokenizer, "rendered", rendered)
    async with served(service) as http:
        assert (await ask(http, messages=[USER] * count, max_tokens=1)).status_code == 200
    assert [name.startswith(lane) for name in threads] == [True]


async def test_special_tokens_where_they_are_wanted(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    await ask(http, add_special_tokens=True, max_tokens=1)
    await http.post("/v1/completions", json={"prompt": "Hi", "add_special_tokens": False, "max_tokens": 1})
    first, second = (request.prompt_token_ids for request in cells.requests)
    assert first == (1, *tokens("u: Hi\na:")) and second == tokens("Hi")


async def test_an_error_after_the_first_block_is_the_last_event(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    def fail(request: object, block: int) -> None:
        if block == 2:
            raise Unavailable("gone")

    cells.fail = fail
    *_, last = events_of((await ask(http, stream=True)).text)
    assert last["error"]["type"] == "unavailable_error"


async def test_a_chat_is_tokenized_as_it_is_asked(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    told = (await http.post("/tokenize", json={"messages": [USER]})).json()
    await ask(http, max_tokens=1)
    assert tuple(told["tokens"]) == cells.requests[0].prompt_token_ids
    for body, param in (({"messages": [USER], "prompt": "Hi"}, "prompt"), ({"messages": [5]}, "messages[0]")):
        refused = await http.post("/tokenize", json=body)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param


def served(service: Generation) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(make_app(service, all_modes)), base_url="http://fake")


def test_the_demo_has_a_template() -> None:
    from twotower.demo import tokenizer

    directory = Path(tokenizer.__file__).parent / "checkpoint"
    assert (directory / "chat_template.jinja").read_text(encoding="utf-8") == tokenizer.CHAT_TEMPLATE
