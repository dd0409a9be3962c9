"""What proxies, browsers and SDKs expect of an HTTP service beside its answers."""

import asyncio
import logging
import subprocess
import sys

import httpx
import pytest
from ray.serve._private.http_util import RequestIdMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.faces.http.proxy_answers import ProxyAnswers
from cluster.faces.http.service import make_app
from cluster.runs.admission import Admission
from cluster.runs.generation import Generation
from cluster.runs.labels import is_label
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, all_modes, generation, served_model
from tests.cluster.test_http import complete, events_of, raising
from twotower.core import DecodingParams
from twotower.errors import DeadlineExceeded, NumericalError, Overloaded, TwoTowerError, Unavailable


def client_of(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fake")


def behind_serve(app: ASGIApp) -> httpx.AsyncClient:
    """As Serve's proxy wraps it, which draws ids and sends them."""
    return client_of(ProxyAnswers(RequestIdMiddleware(app)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("header", [None, "from-a-gateway"])
async def test_one_request_id_header_behind_serves_proxy(
    cells: ScriptedCells, header: str | None, stream: bool
) -> None:
    async with behind_serve(make_app(generation(cells), all_modes)) as http:
        headers = {"x-request-id": header} if header else {}
        response = await http.post("/v1/completions", json={"prompt": "Hi", "stream": stream}, headers=headers)
    [shown] = response.headers.get_list("x-request-id")
    body = events_of(response.text)[0] if stream else response.json()
    assert body["request_id"] == shown == (header or shown) and body["id"] != shown


UNUSABLE = ["a b", "x" * 129, "\xe9", "tab\there", ""]


@pytest.mark.parametrize("header", UNUSABLE)
async def test_a_header_that_cannot_be_a_label_is_left_out(cells: ScriptedCells, header: str) -> None:
    """Nor does it come back, behind Serve's proxy or alone."""
    app = make_app(generation(cells), all_modes)
    for client in (behind_serve(app), client_of(app)):
        async with client as http:
            headers = {"x-request-id": header.encode("latin-1")}
            plain = await http.post("/v1/completions", json={"prompt": "Hi"}, headers=headers)
            named = await http.post("/v1/completions", json={"prompt": "Hi", "request_id": "mine"}, headers=headers)
        [shown] = plain.headers.get_list("x-request-id")
        assert plain.status_code == 200 and plain.json()["request_id"] == shown and is_label(shown)
        assert named.json()["request_id"] == "mine"


async def test_one_id_for_several_calls_at_once_is_fine(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    cells.pace_s = 0.005
    headers = {"x-request-id": "propagated"}
    calls = [http.post("/v1/completions", json={"prompt": "Hi"}, headers=headers) for _ in range(5)]
    bodies = [response.json() for response in await asyncio.gather(*calls)]
    assert {body["request_id"] for body in bodies} == {"propagated"}
    assert len({body["id"] for body in bodies}) == len({request.id for request in cells.requests}) == 5


async def test_a_label_is_logged_beside_our_id(
    http: httpx.AsyncClient, cells: ScriptedCells, caplog: pytest.LogCaptureFixture
) -> None:
    cells.fail = raising(ZeroDivisionError("x"), at_block=0)  # type: ignore[arg-type]
    with caplog.at_level(logging.ERROR):
        await complete(http, request_id="mine")
    assert f"request {cells.requests[0].id} (mine): internal error" in caplog.text


@pytest.mark.parametrize("label", ["a b", "é", "x" * 129])
async def test_a_label_is_bounded(http: httpx.AsyncClient, cells: ScriptedCells, label: str) -> None:
    response = await complete(http, request_id=label)
    assert response.status_code == 400 and response.json()["error"]["param"] == "request_id" and not cells.requests


async def test_one_model_by_its_name(http: httpx.AsyncClient) -> None:
    [card] = (await http.get("/v1/models")).json()["data"]
    assert (await http.get("/v1/models/fake")).json() == card
    for name in ("other", "org/other"):
        response = await http.get(f"/v1/models/{name}")
        assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
    response = await complete(http, model="other")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models", "/v1/models/fake"])
async def test_head_is_get_without_a_body(http: httpx.AsyncClient, path: str) -> None:
    got, head = await http.get(path), await http.head(path)
    assert head.status_code == got.status_code == 200


async def test_other_pages_may_read_answers_only_where_the_configuration_says_so(cells: ScriptedCells) -> None:
    asking = {"origin": "https://page.example", "access-control-request-method": "POST"}
    asking["access-control-request-headers"] = "authorization, content-type"
    async with client_of(make_app(generation(cells), all_modes)) as http:
        assert (await http.options("/v1/completions", headers=asking)).status_code == 405
    origins = ["https://page.example"]
    async with client_of(make_app(generation(cells), all_modes, cors_origins=origins)) as http:
        allowed = await http.options("/v1/completions", headers=asking)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == origins[0]
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        for body in ({"prompt": "Hi"}, {"prompt": 5}):
            answer = await http.post("/v1/completions", json=body, headers={"origin": origins[0]})
            assert answer.headers["access-control-allow-origin"] == origins[0]
        other = await http.post("/v1/completions", json={"prompt": "Hi"}, headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


ORIGIN = "https://page.example"
ASKING = {"origin": ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}


@pytest.mark.parametrize(
    ("change", "words"),
    [({"origin": "https://other.example"}, "origin"), ({"access-control-request-method": "DELETE"}, "method")],
)
async def test_a_refused_preflight_is_told_as_what_it_is(
    cells: ScriptedCells, change: dict[str, str], words: str
) -> None:
    async with behind_serve(make_app(generation(cells), all_modes, cors_origins=[ORIGIN])) as http:
        refused = await http.options("/v1/completions", headers=ASKING | change)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["message"] == f"Disallowed CORS {words}"
    assert "access-control-allow-origin" not in refused.headers and "Origin" in refused.headers["vary"]


@pytest.mark.parametrize("origins", [[ORIGIN], ["*"], []])
async def test_a_page_that_may_read_answers_may_read_those_of_the_proxy(
    cells: ScriptedCells, origins: list[str]
) -> None:
    """Its preflights pass too, or the browser would not send what follows."""
    router, gone = make_app(generation(cells), all_modes, cors_origins=origins), False

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        await (PlainTextResponse("Path not found", 404) if gone else router)(scope, receive, send)

    async with behind_serve(serve) as http:
        await http.post("/v1/completions", json={"prompt": "Hi"}, headers={"origin": ORIGIN})
        gone = True
        answer = await http.post("/v1/completions", json={"prompt": "Hi"}, headers={"origin": ORIGIN})
        preflight = await http.options("/v1/completions", headers=ASKING)
        other = await http.post("/v1/completions", headers={"origin": "https://other.example"})
        none = await http.post("/v1/completions")
    assert answer.status_code == other.status_code == none.status_code == 503
    readable = [response.headers.get("access-control-allow-origin") for response in (answer, preflight, other, none)]
    if origins:
        exposed = answer.headers["access-control-expose-headers"]
        assert "Retry-After" in exposed and "x-should-retry" in exposed and preflight.status_code == 200
    everybody = "https://other.example" if origins == ["*"] else None
    assert readable == ([ORIGIN, ORIGIN, everybody, None] if origins else [None] * 4)


async def test_the_proxy_forgets_a_page_that_may_not_read_any_more(cells: ScriptedCells) -> None:
    allowed = make_app(generation(cells), all_modes, cors_origins=[ORIGIN])
    routers: list[ASGIApp] = [PlainTextResponse("", 404), make_app(generation(cells), all_modes), allowed]

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        await routers.pop()(scope, receive, send)

    async with behind_serve(serve) as http:
        answers = [await http.get("/health", headers={"origin": ORIGIN}) for _ in range(3)]
    shown = [answer.headers.get("access-control-allow-origin") for answer in answers]
    assert shown == [ORIGIN, None, None] and answers[-1].status_code == 503


@pytest.mark.parametrize(
    ("error", "retry_after", "should_retry"),
    [
        (Overloaded("full", 17.2), "18", "true"),
        (Unavailable("gone"), "5", "true"),
        (DeadlineExceeded("late"), None, "false"),
        (NumericalError("NaN"), None, "false"),
    ],
)
async def test_sdks_are_told_whether_and_when_to_come_again(
    http: httpx.AsyncClient, cells: ScriptedCells, error: TwoTowerError, retry_after: str | None, should_retry: str
) -> None:
    cells.fail = raising(error, at_block=0)  # type: ignore[arg-type]
    headers = (await complete(http)).headers
    assert headers.get("retry-after") == retry_after and headers["x-should-retry"] == should_retry


async def test_beyond_what_the_cells_hold_is_refused_at_once(cells: ScriptedCells) -> None:
    cells.pace_s = 60
    service = Generation(served_model(ByteTokenizer()), cells, at_once=2, admission=Admission(capacity=3, slots=2))
    async with client_of(make_app(service, all_modes)) as http:
        running = [asyncio.create_task(complete(http, prompt=prompt)) for prompt in (["a", "b", "c"], "d")]
        while cells.open < 3:
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            response = await complete(http)
            assert response.status_code == 429 and 1 <= int(response.headers["retry-after"]) <= 60
            assert (await http.get("/health")).status_code == 200
            assert (await complete(http, prompt=5)).status_code == 400, "what is wrong is said all the same"
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert cells.open == service.admission.running == 0
        cells.pace_s = 0
        for stream in (False, True):
            assert (await complete(http, stream=stream)).status_code == 200
        assert service.admission.running == 0


async def test_max_tokens_left_out_is_what_fits(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    """The fake's longest sequence is 256, its default 128."""
    for length, wanted in ((100, 128), (128, 128), (129, 127), (255, 1)):
        assert (await complete(http, prompt=[5] * length)).status_code == 200
        assert cells.requests[-1].params.max_new_tokens == wanted
    full = (await complete(http, prompt=[5] * 256)).json()["error"]
    assert full["param"] == "prompt" and "got 256 tokens, wanted at most 255" in full["message"]
    asked = (await complete(http, prompt=[5] * 200, max_tokens=57)).json()["error"]
    assert asked["param"] == "max_tokens" and "max_new_tokens" not in asked["message"]
    assert DecodingParams().max_new_tokens == 128


@pytest.mark.parametrize("status", [404, 500, 503, None])
async def test_serves_own_answers_are_in_our_words(status: int | None) -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        if status is not None:
            start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]}
            await send(start)  # type: ignore[operator]
            await send({"type": "http.response.body", "body": b"Path '/' not found."})  # type: ignore[operator]

    async with behind_serve(app) as http:
        response = await http.post("/v1/completions", headers={"x-request-id": "mine"})
        assert response.status_code == 503 and response.json()["error"]["type"] == "unavailable_error"
        assert response.headers["retry-after"] and response.headers["x-should-retry"] == "true"
        assert response.headers.get_list("x-request-id") == ["mine"]
        if status:
            assert (await http.get("/-/healthz")).text.startswith("Path"), "Serve's own probes are its own"


async def test_a_stream_that_a_dead_router_leaves_ends_with_an_error() -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})  # type: ignore[operator]
        part = {"type": "http.response.body", "body": b'data: {"choices": []}\n\n', "more_body": True}
        await send(part)  # type: ignore[operator]

    async with behind_serve(app) as http:
        first, last = events_of((await http.post("/v1/completions")).text)
    assert first == {"choices": []} and last["error"]["type"] == "unavailable_error"


async def test_a_stream_that_nobody_reads_has_its_place_until_the_deadline(
    cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.faces.http.answers._LAST_WORDS_S", 0.05)
    service, begun = generation(cells), asyncio.Event()
    app = make_app(service, all_modes)
    parts = [{"type": "http.request", "body": b'{"prompt": "Hi", "stream": true}'}]

    async def receive() -> dict[str, object]:
        return parts.pop() if parts else await asyncio.Future()  # type: ignore[return-value]

    async def send(message: object) -> None:
        begun.set()
        await asyncio.Future()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "root_path": ""}
    scope |= {"headers": [(b"x-request-timeout", b"0.1")], "http_version": "1.1", "scheme": "http"}
    call = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        await begun.wait()
        assert service.admission.running == 1
        await call
    assert service.admission.running == cells.open == 0


def test_a_proxy_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'grpc', 'ray', 'fastapi', 'pydantic', 'transformers'}"
    script = f"import sys, cluster.faces.http.proxy_answers; sys.exit(' '.join({heavy} & sys.modules.keys()) or None)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
