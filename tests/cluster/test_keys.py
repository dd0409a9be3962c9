"""With a file of keys nobody gets anything without one, over either face, but whether the service lives."""

import asyncio
import base64
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import yaml
from fastapi import FastAPI
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.board.face import add_ops
from cluster.board.feed import Feed
from cluster.cli import asking, status
from cluster.config import ServiceConfig
from cluster.faces.credentials import key_of
from cluster.faces.http.service import make_app
from cluster.ops import deployment
from cluster.ops.run_state import RunState
from cluster.router import door
from cluster.runs.generation import Generation
from cluster.runs.keys import hash_of, new_key, read_keys
from cluster.runs.labels import OWN_ID, REQUEST_ID
from cluster.watch import router_metrics
from cluster.watch.run_metrics import RunMetrics
from cluster.watch.tally import Tally
from tests.cluster.board.signed import Hearing
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, all_modes, grpc_server, served_model
from tests.cluster.test_grpc import details_of
from tests.cluster.up_process import CHECKOUT
from twotower.errors import ConfigError
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

KEY, SMALL = new_key(), new_key()
BODY = {"prompt": "Hi", "max_tokens": 8}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    small = {"concurrent_requests": 1, "tokens_per_minute": 1000, "priority_from": 0}
    entries = [{"name": "team-a", "sha256": hash_of(KEY)}, {"name": "small", "sha256": hash_of(SMALL), **small}]
    path.write_text(yaml.safe_dump({"keys": entries}))
    return path


class Guarded:
    """A router's faces behind keys."""

    def __init__(self, file: Path) -> None:
        self.cells, self.tally = ScriptedCells(), Tally()
        config = ServiceConfig.parse({"ingress": {"keys_file": str(file)}})
        self.service = Generation(
            served_model(ByteTokenizer()), self.cells, observers=[RunMetrics(self.tally)], door=door(config)
        )
        self.app: FastAPI = make_app(self.service, all_modes, cors_origins=["https://page.example"])
        add_ops(self.app, Feed(Hearing(heard=[]).board), keys=True)

    @asynccontextmanager
    async def http(self, key: str | None = None) -> AsyncGenerator[httpx.AsyncClient, None]:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://fake", headers=headers
        ) as http:
            yield http


@pytest.fixture
def guarded(file: Path) -> Guarded:
    return Guarded(file)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (None, None),
        ("", None),
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Bearer", None),
        ("Basic " + base64.b64encode(b"anybody:abc").decode(), "abc"),
        ("Basic " + base64.b64encode(b":a:b").decode(), "a:b"),
        ("Basic " + base64.b64encode(b"abc").decode(), None),
        ("Basic !!!", None),
        ("Basic " + base64.b64encode(b"\xff\xfe:abc").decode(), None),
        ("Digest abc", None),
    ],
)
def test_how_a_key_is_sent(text: str | None, key: str | None) -> None:
    assert key_of([] if text is None else [text]) == key
    assert key_of([text or "", "Bearer abc"]) is None, "which of them?"


async def test_every_path_but_health_wants_a_key(guarded: Guarded) -> None:
    paths = {route.path for route in guarded.app.routes}  # type: ignore[attr-defined]
    assert {"/v1/completions", "/v1/score", "/ops", "/ops/stream", "/version", "/v1/models"} <= paths
    async with guarded.http() as http:
        for path in {*paths, "/", "/nothing", "/health/", "/ready/x", "//health"} - {"/health", "/ready"}:
            for method in ("GET", "POST", "HEAD", "DELETE"):
                answer = await http.request(method, path.replace("{name:path}", "fake"))
                assert answer.status_code == 401, (method, path)
                assert answer.headers.get_list("www-authenticate") == ['Basic realm="TwoTower Serve"', "Bearer"]
        told = (await http.post("/v1/completions", json=BODY)).json()["error"]
        assert told["code"] == "invalid_api_key" and "Authorization: Bearer KEY" in told["message"]
        assert (await http.get("/health")).status_code == 200 == (await http.get("/ready")).status_code
        asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
        asked["access-control-request-headers"] = "authorization"
        assert (await http.options("/v1/completions", headers=asked)).status_code == 200, "a browser sends no key there"
    async with guarded.http(new_key()) as http:
        answer = await http.post("/v1/completions", json=BODY)
        assert answer.status_code == 401 and "not known" in answer.json()["error"]["message"]
    assert not guarded.cells.requests


async def test_with_a_key_all_is_as_ever(guarded: Guarded) -> None:
    async with guarded.http(KEY) as http:
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        assert (await http.get("/v1/models")).status_code == 200 == (await http.get("/ops")).status_code
    async with guarded.http() as http:
        shown = await http.get("/ops", auth=("anybody", KEY))
        assert shown.status_code == 200 and '<body data-keys="true">' in shown.text


async def test_a_page_of_elsewhere_cannot_use_the_key_that_a_browser_keeps(guarded: Guarded) -> None:
    async with guarded.http() as http:
        for site, status in (("cross-site", 401), ("same-site", 401), ("same-origin", 200), ("none", 200)):
            sent = {"sec-fetch-site": site, "content-type": "text/plain"}
            answer = await http.post("/v1/completions", json=BODY, headers=sent, auth=("anybody", KEY))
            assert answer.status_code == status, site
        follows = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        assert (await http.get("/ops", headers=follows, auth=("anybody", KEY))).status_code == 200, "a link to it"
        refused = await http.post("/v1/completions", json=BODY, headers=follows, auth=("anybody", KEY))
        assert refused.status_code == 401 and "own pages" in refused.json()["error"]["message"]
        for origin, status in (("http://evil.example", 401), ("null", 401), ("http://fake", 200)):
            answer = await http.post("/v1/completions", json=BODY, headers={"origin": origin}, auth=("anybody", KEY))
            assert answer.status_code == status, origin
    async with guarded.http(KEY) as http:
        answer = await http.post("/v1/completions", json=BODY, headers={"sec-fetch-site": "cross-site"})
        assert answer.status_code == 200, "that page knows the key"


async def test_a_websocket_is_closed(guarded: Guarded) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    await guarded.app({"type": "websocket", "path": "/health", "headers": []}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_openais_client_gets_its_own_error(guarded: Guarded) -> None:
    async with AsyncExitStack() as stack:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(guarded.app))
        stack.push_async_callback(http.aclose)
        wrong = openai.AsyncOpenAI(base_url="http://fake/v1", api_key="sk-wrong", http_client=http)
        with pytest.raises(openai.AuthenticationError):
            await wrong.completions.create(model="fake", prompt="Hi")
        right = openai.AsyncOpenAI(base_url="http://fake/v1", api_key=KEY, http_client=http)
        assert (await right.completions.create(model="fake", prompt="Hi")).choices[0].text
        guarded.cells.pace_s = 60
        small = openai.AsyncOpenAI(base_url="http://fake/v1", api_key=SMALL, http_client=http, max_retries=0)
        running = asyncio.create_task(small.completions.create(model="fake", prompt="Hi"))
        while not guarded.cells.open:
            await asyncio.sleep(0.001)
        with pytest.raises(openai.RateLimitError) as caught:
            await small.completions.create(model="fake", prompt="Hi")
        assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("rate_limit_exceeded", "1")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_keys_limits_over_http(guarded: Guarded) -> None:
    guarded.cells.pace_s = 0.05
    async with guarded.http(SMALL) as http, guarded.http(KEY) as other:
        refused = await http.post("/v1/completions", json=BODY | {"priority": -1})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "priority"
        running = asyncio.create_task(http.post("/v1/completions", json=BODY))
        while not guarded.cells.open:
            await asyncio.sleep(0.001)
        refused = await http.post("/v1/completions", json=BODY)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert (await other.post("/v1/completions", json=BODY)).status_code == 200, "no limit of this one's"
        assert (await running).status_code == 200
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
    refused_for = {labels for (metric, labels) in guarded.tally._added if metric is router_metrics.REFUSED}
    assert refused_for == {("INVALID_ARGUMENT",)}, "a key's limit says nothing of the service's room"
    added = {labels: n for (metric, labels), n in guarded.tally._added.items() if metric is router_metrics.KEY_LIMITS}
    assert added == {("small", "concurrent_requests"): 1}


async def test_a_key_pays_for_each_answer_and_for_chats(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    entry = {"name": "small", "sha256": hash_of(SMALL), "concurrent_requests": 3, "tokens_per_minute": 120}
    path.write_text(yaml.safe_dump({"keys": [entry]}))
    guarded = Guarded(path)
    guarded.service._allowances._clock = lambda: 0.0
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}

    async def ask(**fields: object) -> httpx.Response:
        async with guarded.http(SMALL) as http:
            return await http.post("/v1/chat/completions", json=chat | fields)

    for fields in ({"n": 4}, {"best_of": 4}):
        refused = await ask(**fields)
        assert refused.status_code == 400 and "got 4 at a time, wanted at most 3" in refused.text
        assert refused.json()["error"]["param"] == next(iter(fields))
    for fields in ({"n": 3}, {"best_of": 2}):  # each reads a prompt of 8 tokens and writes 8
        assert (await ask(**fields)).status_code == 200
    refused = await ask(n=3)  # at most 9 tokens each, as far as is known before
    assert refused.status_code == 200, "27 of 40"
    refused = await ask()
    assert refused.status_code == 429 and "0 of this key's 120 tokens a minute are left here" in refused.text
    assert guarded.service._allowances._accounts["small"].left == 120 - 8 * 16


async def test_grpc_wants_a_key_but_for_health(guarded: Guarded) -> None:
    request = pb.GenerateRequest(text="Hi", params=pb.DecodingParams(max_new_tokens=8))
    with_key = [("authorization", f"Bearer {KEY}")]
    async with grpc_server(guarded.service) as (address, _), grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        for metadata in ([], [("authorization", "Bearer tt-wrong")]):
            calls: list[Any] = [
                stub.Generate(request, metadata=metadata),
                stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata),
                stub.GenerateStream(request, metadata=metadata).read(),
                _reflected(channel, metadata),
            ]
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, caught.value
                assert {OWN_ID, REQUEST_ID} <= dict(caught.value.trailing_metadata()).keys()
        assert not guarded.cells.requests
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert (await stub.Generate(request, metadata=with_key)).text
        assert await _reflected(channel, with_key)


async def test_a_refusal_does_not_wait_for_the_message(guarded: Guarded) -> None:
    """Or whoever has no key could keep calls open for ever, and fill memory with messages."""
    bare: Any = {"request_serializer": bytes, "response_deserializer": bytes}
    async with grpc_server(guarded.service) as (address, _), grpc.aio.insecure_channel(address) as channel:
        silent = channel.stream_stream("/twotower.v1.GenerationService/Generate", **bare)()
        unknown = channel.stream_stream("/no.such.Service/Method", **bare)()
        large = channel.unary_unary("/twotower.v1.GenerationService/Generate", **bare)(bytes(5 * 2**20))
        for call in (silent, unknown, large):
            async with asyncio.timeout(10):
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def _reflected(channel: grpc.aio.Channel, metadata: Any) -> Any:
    async def asks() -> AsyncGenerator[Any, None]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    return [answer async for answer in stub.ServerReflectionInfo(asks(), metadata=metadata)]


async def test_a_keys_limits_over_grpc(guarded: Guarded) -> None:
    guarded.cells.pace_s = 0.05
    request = pb.GenerateRequest(text="Hi", params=pb.DecodingParams(max_new_tokens=40))
    small = [("authorization", f"Bearer {SMALL}")]
    async with grpc_server(guarded.service) as (address, _), grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        stream = stub.GenerateStream(request, metadata=small)
        await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(request, metadata=small)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        quota = details_of(caught.value, error_details_pb2.QuotaFailure)
        assert quota.violations[0].subject == "key:small" and "at a time" in quota.violations[0].description
        assert details_of(caught.value, error_details_pb2.RetryInfo).retry_delay.seconds == 1
        stream.cancel()


async def test_our_commands_send_the_key_of_the_environment(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with grpc_server(guarded.service) as (address, _):
        with pytest.raises(asking.Refused, match=r"requires a key.* TWOTOWER_API_KEY") as caught:
            await asyncio.to_thread(asking.model_info, address)
        assert caught.value.mistake
        monkeypatch.setenv("TWOTOWER_API_KEY", KEY + "\nx")
        with pytest.raises(ConfigError, match="TWOTOWER_API_KEY: holds a character") as wrong:
            asking.credentials()
        assert KEY not in str(wrong.value)
        monkeypatch.setenv("TWOTOWER_API_KEY", KEY + "\n")
        assert (await asyncio.to_thread(asking.model_info, address)).name == "fake"
        await asyncio.to_thread(asking.generate, address, "Hi", {"timeout_s": 20.0}, False)
    assert "good things" in capsys.readouterr().out


def test_a_file_that_is_wrong_is_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keys_file: got 'none', wanted an absolute path"):
        ServiceConfig.parse({"ingress": {"keys_file": "none"}})
    missing = ServiceConfig.parse({"ingress": {"keys_file": str(tmp_path / "none")}})
    with pytest.raises(ConfigError, match=r"ingress.keys_file: .* cannot be read"):
        deployment.check(missing)


def _key(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", "key", *arguments]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=os.environ)


@pytest.mark.slow
def test_the_command_draws_a_key_and_writes_its_entry(tmp_path: Path) -> None:
    drawn = _key("team-a", "--concurrent-requests", "8", "--priority-from", "-5")
    assert drawn.returncode == 0, drawn.stderr
    key = drawn.stderr.strip().rpartition(" ")[2]
    assert drawn.stderr == f"the key of team-a, shown this once: {key}\n" and key not in drawn.stdout
    path = tmp_path / "keys.yaml"
    path.write_text("keys:\n" + drawn.stdout)
    [entry] = read_keys(path)
    assert (entry.name, entry.sha256) == ("team-a", hash_of(key))
    assert (entry.concurrent_requests, entry.tokens_per_minute, entry.priority_from) == (8, None, -5)
    assert _key("on").stdout.startswith("  - name: 'on'\n")
    wrong = _key("team a", "--tokens-per-minute", "0")
    assert wrong.returncode == 2 and "name: " in wrong.stderr and "tokens_per_minute: " in wrong.stderr


def test_status_of_ones_own_service_needs_no_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For all but what is served."""

    def refuse(address: str) -> None:
        raise asking.Refused(f"{address}: this service requires a key", True)

    monkeypatch.setattr(asking, "model_info", refuse)
    status.print_note(RunState(4711, 1, "127.0.0.1:8000", "127.0.0.1:50051", "demo"), {"ar": True})
    said = capsys.readouterr().out
    assert "4711" in said and "not told: 127.0.0.1:50051: this service requires a key" in said
