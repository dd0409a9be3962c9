"""Spans of runs, under the trace that the caller named, whichever face it came by."""

import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from cluster.faces.http.service import make_app
from cluster.runs.generation import Generation
from cluster.runs.run import Patience
from cluster.watch import otlp, run_traces
from cluster.watch.router import RouterWatch
from cluster.watch.run_traces import RunTraces
from tests.cluster.fakes import ByteTokenizer, grpc_server, served_model, tokens
from tests.cluster.runs.script import GONE, WELL, Script, Stay
from tests.cluster.watch.noted import Noted
from twotower.core import Mode
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

ANSWER = tokens("never tell the heron")
BLOCKS = 5
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Traced:
    """A service over a script whose spans are kept."""

    def __init__(self, *stays: Stay) -> None:
        self.kept, self.script = InMemorySpanExporter(), Script(ANSWER, stays or (WELL,))
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.kept))
        observers = (RunTraces(provider.get_tracer("test"), "demo"),)
        self.service = Generation(
            served_model(ByteTokenizer()), self.script, patience=Patience(3, 0.05), observers=observers
        )

    async def by_http(self, headers: dict[str, str], **fields: object) -> httpx.Response:
        transport = httpx.ASGITransport(make_app(self.service, lambda: True))
        async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
            return await http.post("/v1/completions", json={"prompt": "the secret", **fields}, headers=headers)

    async def by_grpc(self, metadata: tuple[tuple[str, str], ...]) -> None:
        async with grpc_server(self.service) as (address, _), grpc.aio.insecure_channel(address) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            await stub.Generate(pb.GenerateRequest(text="the secret"), metadata=metadata)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.kept.get_finished_spans() if span.name == name]

    @property
    def request(self) -> ReadableSpan:
        [span] = self.named("request")
        return span


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


@pytest.mark.parametrize("face", ["http", "http stream", "grpc"])
async def test_a_request_belongs_to_the_caller_s_trace(face: str) -> None:
    traced = Traced()
    if face == "grpc":
        await traced.by_grpc((("traceparent", TRACEPARENT), ("tracestate", "vendor=7")))
    else:
        await traced.by_http({"traceparent": TRACEPARENT, "tracestate": "vendor=7"}, stream=face == "http stream")
    request = traced.request
    assert request.parent is not None and request.parent.is_remote
    assert f"{request.parent.trace_id:032x}-{request.parent.span_id:016x}" == f"{TRACE}-{PARENT}"
    assert request.context.trace_state.get("vendor") == "7"
    [queue], [attempt], blocks = traced.named("queue"), traced.named("attempt"), traced.named("block")
    assert parent_of(queue) == parent_of(attempt) == request.context.span_id
    assert {parent_of(block) for block in blocks} == {attempt.context.span_id} and len(blocks) == BLOCKS
    assert {span.context.trace_id for span in traced.kept.get_finished_spans()} == {int(TRACE, 16)}
    told = dict(request.attributes or {})
    assert (told["twotower.mode"], told["gen_ai.usage.output_tokens"]) == ("diffusion", len(ANSWER))
    assert told["gen_ai.response.finish_reasons"] == ("length",) and told["rpc.grpc.status_code"] == 0
    assert [dict(block.attributes or {})["twotower.steps"] for block in blocks] == [2] * BLOCKS


async def test_times_follow_each_other() -> None:
    traced = Traced()
    await traced.by_http({})
    request, [queue], [attempt], blocks = traced.request, *map(traced.named, ("queue", "attempt", "block"))
    assert request.parent is None, "a trace of its own"
    assert request.start_time == queue.start_time and queue.end_time == attempt.start_time == blocks[0].start_time
    assert [block.end_time for block in blocks[:-1]] == [block.start_time for block in blocks[1:]]
    assert attempt.end_time == request.end_time >= (blocks[-1].end_time or 0)


@pytest.mark.parametrize("wrong", ["", "00-zz-1-01", "x" * 1000, f"00-{'0' * 32}-{PARENT}-01"])
async def test_a_wrong_header_begins_a_trace_of_its_own(wrong: str) -> None:
    traced = Traced()
    assert (await traced.by_http({"traceparent": wrong})).status_code == 200
    assert traced.request.parent is None


async def test_a_caller_that_samples_nothing_is_obeyed() -> None:
    traced = Traced()
    await traced.by_http({"traceparent": TRACEPARENT.removesuffix("01") + "00"})
    assert not traced.kept.get_finished_spans()


async def test_a_resume_links_to_what_was_lost() -> None:
    traced = Traced(Stay(2, GONE, cell="a"), Stay(0, GONE, cell="b"), Stay(cell="c"))
    await traced.by_http({})
    first, second, third = traced.named("attempt")
    assert [link.context.span_id for link in second.links] == [first.context.span_id]
    assert [link.context.span_id for link in third.links] == [second.context.span_id] and not first.links
    assert dict(second.links[0].attributes or {}) == {"twotower.why": "Unavailable"}
    assert [attempt.status.status_code for attempt in (first, second, third)] == [
        StatusCode.ERROR,
        StatusCode.ERROR,
        StatusCode.UNSET,
    ]
    cells = [dict(attempt.attributes or {}) for attempt in (first, second, third)]
    assert [(one["twotower.cell"], one["twotower.committed_tokens"]) for one in cells] == [("a", 0), ("b", 8), ("c", 8)]
    assert len(traced.named("queue")) == 3 and len(traced.named("block")) == BLOCKS
    assert traced.request.status.status_code is StatusCode.UNSET, "the client saw none of it"


async def test_a_request_that_fails_says_so_and_leaves_nothing_open() -> None:
    traced = Traced(Stay(1, GONE))
    assert (await traced.by_http({})).status_code == 503
    assert traced.request.status.status_code is StatusCode.ERROR and traced.request.status.description == "UNAVAILABLE"
    assert dict(traced.request.attributes or {})["rpc.grpc.status_code"] == 14
    assert all(span.end_time for span in traced.kept.get_finished_spans()) and len(traced.named("attempt")) == 4


async def test_each_prompt_is_a_request_and_no_span_has_text() -> None:
    traced = Traced()
    await traced.by_http({"traceparent": TRACEPARENT}, prompt=["the secret", "the secret"])
    assert len(traced.named("request")) == 2
    told = "".join(span.to_json() for span in traced.kept.get_finished_spans())
    assert "secret" not in told and "heron" not in told and str(list(ANSWER))[1:12] not in told


async def test_a_long_answer_has_spans_for_its_first_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_traces, "MOST_BLOCKS", 3)
    traced = Traced()
    await traced.by_http({})
    assert len(traced.named("block")) == 3
    assert dict(traced.request.attributes or {})["twotower.blocks"] == BLOCKS


async def test_rounds_of_verified_have_spans_that_tell_what_was_accepted() -> None:
    traced = Traced()
    await traced.by_http({}, diffusion={"mode": "verified"})
    rounds = [dict(span.attributes or {}) for span in traced.named("block")]
    assert len(rounds) == BLOCKS and all(one["twotower.drafted"] > one["twotower.accepted"] for one in rounds)
    told = dict(traced.request.attributes or {})
    assert told["twotower.drafted"] == len(ANSWER) and told["twotower.accepted"] == len(ANSWER) - BLOCKS


async def test_causal_modes_have_no_spans_for_blocks() -> None:
    traced = Traced()
    await traced.by_http({}, diffusion={"mode": "ar"})
    assert not traced.named("block") and len(traced.named("attempt")) == 1


def test_without_a_collector_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in otlp.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert otlp.provider() is None
    assert not any(isinstance(one, RunTraces) for one in RouterWatch("demo", (Mode.AR,), Noted()).observers)
    monkeypatch.setenv(otlp.ENDPOINTS[0], "http://127.0.0.1:9/v1/traces")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert otlp.provider() is None


def test_an_exporter_that_is_not_installed_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.setenv(otlp.ENDPOINTS[1], "http://127.0.0.1:9")
    assert otlp.provider() is None and "twotower[otel]" in caplog.text


class Collector(BaseHTTPRequestHandler):
    """What an OTLP collector hears."""

    heard: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert self.path == "/v1/traces" and self.headers.get("content-encoding") is None
        self.heard.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ExportTraceServiceRequest]]:
    heard: list[ExportTraceServiceRequest] = []
    handler = type("Handler", (Collector,), {"heard": heard})
    with socketserver.TCPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield heard
        finally:
            server.shutdown()
            thread.join()


async def test_spans_reach_a_collector(collector: list[ExportTraceServiceRequest]) -> None:
    watch = RouterWatch("demo", tuple(Mode), Noted())
    service = Generation(served_model(ByteTokenizer()), Script(ANSWER, [WELL]), observers=watch.observers)
    transport = httpx.ASGITransport(make_app(service, lambda: True))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
        await http.post("/v1/completions", json={"prompt": "Hi"}, headers={"traceparent": TRACEPARENT})
    await watch.stop()
    [resource] = [spans for request in collector for spans in request.resource_spans]
    about = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert (about["service.name"], about["deployment.environment.name"]) == ("twotower", "test")
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["attempt", *["block"] * BLOCKS, "queue", "request"]
    assert watch._spans is not None
    watch._spans.shutdown()
