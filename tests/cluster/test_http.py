"""The HTTP face over scripted cells."""

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from cluster.faces.http.service import make_app
from tests.cluster.fakes import ScriptedCells, all_modes, generation, tokens
from twotower.core import Mode, Request
from twotower.errors import DeadlineExceeded, NumericalError, Overloaded, TwoTowerError, Unavailable

TEXT = "All good things come to those who wait."


async def complete(http: httpx.AsyncClient, **fields: object) -> httpx.Response:
    return await http.post("/v1/completions", json={"prompt": "Hi", **fields})


def events_of(body: str) -> list[Any]:
    """The JSON of every server-sent event, [DONE] as a string."""
    parts = [event.removeprefix("data: ") for event in body.split("\n\n") if event]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]


async def test_whole_answer_in_openai_shape(http: httpx.AsyncClient) -> None:
    response = await complete(http, request_id="r-1", seed=7)
    body = response.json()
    assert response.status_code == 200
    assert response.headers["x-request-id"] == body["request_id"] == "r-1" and body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion" and body["model"] == "fake"
    [choice] = body["choices"]
    assert choice["text"] == TEXT and choice["finish_reason"] == "stop" and choice["index"] == 0
    assert tuple(choice["token_ids"]) == tokens(TEXT) and choice["seed"] == 7
    n = len(tokens(TEXT))
    assert body["usage"] == {
        "prompt_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens": n,
        "total_tokens": 3 + n,
        "num_steps": 20,
        "num_blocks": 10,
        "num_drafted": 0,
        "num_accepted": 0,
        "num_ar_blocks": 0,
        "num_diffusion_blocks": 0,
        "tokens_per_step": n / 20,
        "mode": "diffusion",
    }


async def test_tokens_per_step_of_a_call(http: httpx.AsyncClient) -> None:
    """Of all its answers together; none where nothing was decoded."""
    several = (await complete(http, prompt=["Hi", "Ho"], n=2, max_tokens=6)).json()["usage"]
    assert (several["completion_tokens"], several["num_steps"], several["tokens_per_step"]) == (24, 16, 1.5)
    [*_, usage, _] = events_of((await complete(http, stream=True, stream_options={"include_usage": True})).text)
    assert usage["usage"]["tokens_per_step"] == len(tokens(TEXT)) / 20
    scored = (await complete(http, echo=True, max_tokens=0)).json()["usage"]
    assert (scored["num_steps"], scored["tokens_per_step"]) == (0, None)


async def test_stream_is_one_event_per_block_and_equals_the_whole(http: httpx.AsyncClient) -> None:
    whole = (await complete(http)).json()["choices"][0]
    response = await complete(http, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events_of(response.text)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert len(chunks) == 10 and done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == whole["token_ids"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 9 + ["stop"]
    assert usage["choices"] == [] and usage["usage"]["num_blocks"] == 10


async def test_every_parameter_reaches_the_cell(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    diffusion = {"mode": "diffusion", "block_size": 8, "steps_per_block": 4, "confidence_threshold": 0.5}
    await complete(http, prompt=[5, 6], max_tokens=9, temperature=0.5, seed=7, ignore_eos=True, diffusion=diffusion)
    await complete(http, diffusion={"mode": "ar"}, top_k=3, top_p=0.5, stop_token_ids=[9], priority=-7)
    first, second = (request.params for request in cells.requests)
    assert cells.requests[0].prompt_token_ids == (5, 6)
    assert [request.priority for request in cells.requests] == [0, -7]
    assert (first.max_new_tokens, first.temperature, first.seed, first.ignore_eos) == (9, 0.5, 7, True)
    assert (first.mode, first.block_size, first.steps_per_block, first.confidence_threshold) == ("diffusion", 8, 4, 0.5)
    assert (second.mode, second.top_k, second.top_p, second.stop_token_ids) == (Mode.AR, 3, 0.5, (9,))


async def test_max_tokens_defaults_to_the_services_and_null_counts_as_not_given(
    http: httpx.AsyncClient, cells: ScriptedCells
) -> None:
    assert (await complete(http, max_tokens=None, logprobs=None, n=1, echo=False, user="me")).status_code == 200
    assert cells.requests[0].params.max_new_tokens == 128


async def test_an_empty_request_id_is_none_given(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    for headers in ({}, {"x-request-id": "mine"}):
        response = await http.post("/v1/completions", json={"prompt": "Hi", "request_id": ""}, headers=headers)
        body = response.json()
        assert body["id"] == cells.requests[-1].id
        assert body["request_id"] == headers.get("x-request-id", body["id"])


async def test_the_prompts_of_a_call_have_ids_of_their_own_under_its_label(
    http: httpx.AsyncClient, cells: ScriptedCells
) -> None:
    response = await http.post("/v1/completions", json={"prompt": ["Hi", "Ho"], "request_id": "a" * 128})
    body = response.json()
    assert response.status_code == 200 and body["request_id"] == "a" * 128
    assert sorted(request.id for request in cells.requests) == [f"{body['id']}-0", f"{body['id']}-1"]


@pytest.mark.parametrize("prompt", [["a", "bb"], [[5], [6, 7]]])
async def test_several_prompts_are_several_choices(http: httpx.AsyncClient, prompt: list[Any]) -> None:
    whole = (await complete(http, prompt=prompt, max_tokens=6)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert [choice["text"] for choice in whole["choices"]] == [TEXT[:6], TEXT[:6]]
    *chunks, done = events_of((await complete(http, prompt=prompt, max_tokens=6, stream=True)).text)
    for index in (0, 1):
        mine = [c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(mine) == TEXT[:6]
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
async def test_as_many_prompts_as_allowed_take_turns(
    http: httpx.AsyncClient, cells: ScriptedCells, stream: bool
) -> None:
    """The cell's queue has room for 96; a call of 256 must not fill it."""
    cells.echo, most = True, 0

    def count(request: Request, block: int) -> None:
        nonlocal most
        most = max(most, cells.open)

    cells.fail = count
    response = await complete(http, prompt=[[4 + place % 250] for place in range(256)], max_tokens=9, stream=stream)
    assert response.status_code == 200
    choices = [e["choices"][0] for e in events_of(response.text)[:-1]] if stream else response.json()["choices"]
    if not stream:
        assert [choice["index"] for choice in choices] == list(range(256))
    for place in range(256):
        ids = [token for choice in choices if choice["index"] == place for token in choice["token_ids"]]
        assert ids == [4 + place % 250] * 9
    assert most == 16 and cells.open == 0


async def test_all_prompts_of_a_call_share_its_deadline(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    cells.pace_s = 0.2
    body = {"prompt": ["Hi"] * 40, "max_tokens": 4}
    response = await http.post("/v1/completions", json=body, headers={"x-request-timeout": "0.3"})
    assert response.status_code == 504
    assert response.json()["error"]["message"] == "not finished within 0.3 s"
    assert len(cells.requests) == 32 and max(cells.timeouts[16:]) < 0.15


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", {"prompt": "a", "model": "a\nb" * 9000}),
        ("POST", "/v1/completions", {"prompt": "a", "a\nb" * 200: 1, "\u2028x\x1b[31m": 2}),
        ("POST", "/v1/completions", {"prompt": "a", "diffusion": {"a\nb" * 200: 1}}),
        ("POST", "/v1/completions", {"prompt": "a", "suffix": "x\n" * 2000}),
        ("POST", "/v1/completions", {"prompt": "a", "logit_bias": list(range(2000))}),
        ("POST", "/v1/completions", {"prompt": "a", "stop": ["x\n" * 2000, 5]}),
        ("GET", "/v1/" + "a%0Ab" * 500, None),
    ],
    ids=["model", "names", "nested name", "value", "list", "stop", "path"],
)
async def test_messages_are_one_line_of_bounded_length(cells: ScriptedCells, method: str, path: str, body: Any) -> None:
    app = make_app(generation(cells), all_modes)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fake") as http:
        error = (await http.request(method, path, json=body)).json()["error"]
    for text in (error["message"], error["param"] or ""):
        assert text.isprintable() and len(text) <= 400, text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_text_and_tokens(http: httpx.AsyncClient, cells: ScriptedCells, stream: bool) -> None:
    body = (await complete(http, stop=["zzz", "things"], stream=stream)).text
    choices = [e["choices"][0] for e in (events_of(body)[:-1] if stream else [json.loads(body)])]
    assert "".join(choice["text"] for choice in choices) == "All good "
    assert tuple(token for choice in choices for token in choice["token_ids"]) == tokens("All good things")
    assert choices[-1]["finish_reason"] == "stop"
    assert cells.open == 0


async def test_small_endpoints(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    [card] = (await http.get("/v1/models")).json()["data"]
    assert card["id"] == "fake" and card["modes"] == list(Mode) and card["max_model_len"] == 256
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/version")).json() == {"version": "0.2.0"}
    ready = await http.get("/ready")
    assert ready.status_code == 200
    assert ready.json() == {"status": "ready", "modes": dict.fromkeys(Mode, True)}
    cells.serves = {Mode.AR}
    without_denoiser = await http.get("/ready")
    assert without_denoiser.status_code == 200
    assert without_denoiser.json()["modes"] == {mode: mode is Mode.AR for mode in Mode}
    cells.is_ready = False
    not_ready = await http.get("/ready")
    assert not_ready.json()["status"] == "not ready" and not any(not_ready.json()["modes"].values())
    assert not_ready.status_code == 503 and "retry-after" in not_ready.headers
    assert (await http.get("/health")).status_code == 200


async def test_wrong_paths_methods_and_models_are_refused_in_the_same_shape(http: httpx.AsyncClient) -> None:
    for response, status in [
        (await http.get("/v2/completions"), 404),
        (await http.get("/v1/completions"), 405),
        (await complete(http, model="gpt-4"), 404),
        (await http.post("/v1/chat/completions", json={"messages": []}), 400),
    ]:
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert (await complete(http, model="fake")).status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full"), 429, "overloaded_error"),
        (Unavailable("gone"), 503, "unavailable_error"),
        (DeadlineExceeded("not finished within 60 s"), 504, "deadline_exceeded_error"),
        (NumericalError("NaN"), 500, "numerical_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_block_has_its_status(
    http: httpx.AsyncClient, cells: ScriptedCells, error: TwoTowerError, status: int, kind: str, stream: bool
) -> None:
    cells.fail = raising(error, at_block=0)
    response = await complete(http, stream=stream)
    assert response.status_code == status
    assert response.json()["error"] == {"message": str(error), "type": kind, "param": None, "code": None}
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert cells.open == 0


async def test_an_error_after_the_first_block_is_the_last_event(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    cells.fail = raising(Unavailable("gone"), at_block=2)
    *chunks, last = events_of((await complete(http, stream=True)).text)
    assert len(chunks) == 2 and last["error"]["type"] == "unavailable_error"


@pytest.mark.parametrize("at_block", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_no_traceback_leaves_and_the_log_has_it(
    http: httpx.AsyncClient, cells: ScriptedCells, caplog: pytest.LogCaptureFixture, stream: bool, at_block: int
) -> None:
    cells.fail = raising(ZeroDivisionError("the secret is 42"), at_block)
    with caplog.at_level(logging.ERROR):
        body = (await complete(http, stream=stream)).text
    assert "Traceback" not in body and "secret" not in body and "ZeroDivision" not in body
    error_id = events_of(body)[-1]["error"]["message"] if stream and at_block else json.loads(body)["error"]["message"]
    assert error_id.split()[-1] in caplog.text and "the secret is 42" in caplog.text
    cells.fail = lambda request, block: None
    assert (await complete(http)).status_code == 200


async def test_the_timeout_header_reaches_the_cell(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    await http.post("/v1/completions", json={"prompt": "Hi"}, headers={"x-request-timeout": "2.5"})
    await complete(http)
    assert cells.timeouts == pytest.approx([2.5, 60.0], abs=0.5)
    for bad in ("0", "-1", "nan", "inf", "soon"):
        response = await http.post("/v1/completions", json={"prompt": "Hi"}, headers={"x-request-timeout": bad})
        assert response.status_code == 400 and response.json()["error"]["param"] == "x-request-timeout"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after_s", [0.0, 0.03])
async def test_a_client_that_leaves_frees_its_sequence(cells: ScriptedCells, stream: bool, after_s: float) -> None:
    cells.pace_s = 0.01
    app = make_app(generation(cells), all_modes)
    leaving = asyncio.Event()
    body = json.dumps({"prompt": ["Hi", "Ho"], "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await leaving.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(0)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    serving = asyncio.create_task(app(scope, receive, send))
    while not cells.open:
        await asyncio.sleep(0)
    await asyncio.sleep(after_s)
    leaving.set()
    await asyncio.gather(serving, return_exceptions=True)
    assert cells.open == 0


async def test_a_client_that_leaves_while_it_uploads_is_no_internal_error(
    cells: ScriptedCells, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b'{"prompt": "H', "more_body": True},
    ]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return messages.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    with caplog.at_level(logging.INFO):
        await make_app(generation(cells), all_modes)(scope, receive, send)
    assert sent[0]["status"] == 499 and cells.requests == []
    assert caplog.text == ""


def raising(error: Exception, at_block: int) -> Any:
    def fail(request: Request, block: int) -> None:
        if block == at_block:
            raise error

    return fail
