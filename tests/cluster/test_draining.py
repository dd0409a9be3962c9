"""A router that shuts down: new requests are told so, running ones finish, what is left hears why it ends."""

import asyncio
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from cluster.board.board import Board
from cluster.board.feed import Feed
from cluster.config import ServiceConfig
from cluster.faces.http.service import make_app
from cluster.ops import draining
from cluster.readiness import Readiness
from cluster.router import Router, deployed
from cluster.runs.deadline import Deadline
from cluster.runs.generation import Ask, Generation
from cluster.runs.record import Record
from cluster.runs.run import Generating, Means
from tests.cluster.fakes import FINGERPRINT, ScriptedCells, all_modes, generation, grpc_server
from tests.cluster.runs.test_remote_cells import _all_free, _joined
from tests.cluster.test_grpc import ask, details_of
from tests.cluster.test_http import TEXT, events_of
from twotower.core import Request, RequestId
from twotower.errors import Unavailable
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc
from twotower.text.answer_text import AnswerText


def router_of(service: Generation, cells: ScriptedCells, readiness: Readiness) -> Router:
    """A Router of parts that need no Ray."""
    router = Router.__new__(Router)
    router._generation, router._admission = service, service.admission
    router._readiness = readiness
    router._board = Board("router", "127.0.0.1", deployed(ServiceConfig(), service.model))
    router._feed = Feed(router._board)
    return router


@pytest.fixture
def cells() -> ScriptedCells:
    return ScriptedCells()


async def test_a_router_drains(cells: ScriptedCells) -> None:
    cells.pace_s = 0.02
    service = generation(cells)
    async with (
        grpc_server(service) as (address, server),
        grpc.aio.insecure_channel(address) as channel,
    ):
        readiness = Readiness(cells, server.set_served)
        await readiness.poll()
        router = router_of(service, cells, readiness)
        stub, health = pb_grpc.GenerationServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        transport = httpx.ASGITransport(make_app(service, readiness))
        async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
            posted = asyncio.create_task(http.post("/v1/completions", json={"prompt": "Hi", "stream": True}))
            called = asyncio.ensure_future(stub.Generate(ask()))
            while cells.open < 2:
                await asyncio.sleep(0.001)
            ending = asyncio.create_task(router.drain(30.0))
            await asyncio.sleep(0)
            refused = await http.post("/v1/completions", json={"prompt": "Hi"})
            assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
            assert refused.json()["error"]["message"] == "the service is shutting down"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(ask())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert details_of(caught.value, error_details_pb2.RetryInfo) is not None
            assert (await http.get("/ready")).status_code == 503 and (await http.get("/health")).status_code == 200
            state = (await health.Check(health_pb2.HealthCheckRequest())).status
            assert state == health_pb2.HealthCheckResponse.NOT_SERVING
            await readiness.poll()
            assert not readiness(), "cells that live do not make it ready again"
            assert not ending.done()
            assert events_of((await posted).text)[-1] == "[DONE]" and (await called).text == TEXT
            await ending


async def test_what_is_left_when_time_is_up_is_told(cells: ScriptedCells) -> None:
    cells.pace_s = 0.02
    service = generation(cells)
    async with grpc_server(service) as (address, _), grpc.aio.insecure_channel(address) as channel:
        router = router_of(service, cells, Readiness(cells))
        transport = httpx.ASGITransport(make_app(service, all_modes))
        async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
            posted = asyncio.create_task(http.post("/v1/completions", json={"prompt": "Hi", "stream": True}))
            called = asyncio.ensure_future(pb_grpc.GenerationServiceStub(channel).Generate(ask()))
            while cells.open < 2:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.03)
            await router.drain(0.01)
            *blocks, last = events_of((await posted).text)
            assert blocks and last["error"]["type"] == "unavailable_error" and "shut down" in last["error"]["message"]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await called
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and cells.open == 0


async def _never() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(("used_s", "finishes"), [(0.0, True), (59.9, False), (70.0, False)])
async def test_one_drain_time_for_both_faces(used_s: float, finishes: bool, cells: ScriptedCells) -> None:
    """Serve ends a replaced router once its HTTP requests have ended, which has taken so long."""
    cells.pace_s = 0.02
    service = generation(cells)
    async with grpc_server(service) as (address, server), grpc.aio.insecure_channel(address) as channel:
        router: Any = router_of(service, cells, Readiness(cells))
        router._grpc, router._watching = server, [asyncio.create_task(_never())]
        router._lines, router._drain_timeout_s = SimpleNamespace(stop=lambda: None), 60.0
        router._watch = SimpleNamespace(stop=partial(asyncio.sleep, 0))
        await router.check_health()
        router._kept_at -= used_s
        called = asyncio.ensure_future(pb_grpc.GenerationServiceStub(channel).Generate(ask()))
        while cells.open < 1:
            await asyncio.sleep(0.001)
        cells.pace_s = 0.02 if finishes else 3600.0
        await router.shutdown()
        if finishes:
            assert (await called).text == TEXT
            return
        with pytest.raises(grpc.aio.AioRpcError, match="the service has shut down") as caught:
            await called
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(caught.value, error_details_pb2.RetryInfo) is not None and cells.open == 0


async def test_what_a_router_gives_up_ends_on_its_cell_too() -> None:
    async with _joined() as (cells, engine, cell):
        record = Record(Request(RequestId("r"), (1, 2)), FINGERPRINT)
        run = Generating(record, Deadline.after(60), Means(cells), AnswerText(None))
        assert (await anext(run)).token_ids == (1, 2)
        waiting = asyncio.ensure_future(run.whole())
        await asyncio.sleep(0)
        run.give_up(Unavailable("closing"))
        with pytest.raises(Unavailable, match="closing"):
            await waiting
        await _all_free(cell)
        assert engine.cancelled == ["r"]


async def test_what_begins_after_the_giving_up_is_given_up_too(cells: ScriptedCells) -> None:
    service = generation(cells)
    service.give_up(Unavailable("closing"))
    run = await service.run(service.check(Ask("Hi")), service.deadline())
    with pytest.raises(Unavailable, match="closing"):
        await anext(run)
    assert cells.requests == []


def test_without_a_service_there_is_nothing_to_wait_for() -> None:
    said: list[str] = []
    draining.drain(b"mark", 60.0, said.append)
    assert said == ["stopping"]


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupt_ends_the_wait_and_the_requests(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it comes, even before the routers have been asked to finish."""
    asked: list[float] = []

    def ask_routers(mark: bytes | None, timeout_s: float, say: object, done: threading.Event) -> None:
        asked.append(timeout_s)
        if not timeout_s:
            done.set()

    said: list[str] = []

    def interrupt(what: str) -> None:
        said.append(what)
        if len(said) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(draining, "_drain", ask_routers)
    monkeypatch.setattr(draining, "_AT_ONCE_S", 0.01)
    draining.drain(b"mark", 60.0, interrupt)
    assert asked == [60.0, 0.0][2 - at :] and said[at:] == ["ending the running requests now"]


class Serve:
    """Serve with some routers of ours. A handle does not know them the first times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, routers: int = 1, misses: int = 0) -> None:
        self.asked: list[tuple[str, str, str, float]] = []
        self._misses = misses
        self.routers = routers
        monkeypatch.setattr("ray.is_initialized", lambda: True)
        monkeypatch.setattr("cluster.ops.ownership.holder", lambda: b"ours")
        monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *names: _Handle(self, names))
        monkeypatch.setattr("ray.serve.status", self._status)
        monkeypatch.setattr(draining, "_AGAIN_S", 0.001)

    def _status(self) -> SimpleNamespace:
        router = SimpleNamespace(replica_states={"RUNNING": self.routers} if self.routers else {"STOPPING": 1})
        return SimpleNamespace(applications={"twotower": SimpleNamespace(deployments={"Router": router})})

    def results(self) -> list[None]:
        if self._misses:
            self._misses -= 1
            raise DeploymentUnavailableError(DeploymentID("Router", "twotower"))
        return [None]


class _Handle:
    def __init__(self, serve: Serve, names: tuple[str, str]) -> None:
        self._serve, self._names = serve, names

    def broadcast(self, method: str, timeout_s: float) -> "_Handle":
        self._serve.asked.append((*self._names, method, timeout_s))
        return self

    def results(self, timeout_s: float, return_exceptions: bool) -> list[None]:
        assert return_exceptions and timeout_s >= 0
        return self._serve.results()


@pytest.mark.parametrize(("mark", "drained"), [(None, False), (b"ours", True), (b"another's", False)])
def test_only_an_application_of_ones_own_is_drained(
    mark: bytes | None, drained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve, said = Serve(monkeypatch), list[str]()
    draining.finish(mark, 0.0, said.append)
    assert serve.asked == [("Router", "twotower", "drain", 0.0)] * drained and not said


def test_routers_are_asked_until_the_handle_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else their streams would be cut when Serve is shut down."""
    serve, said = Serve(monkeypatch, misses=3), list[str]()
    draining.finish(b"ours", 7.0, said.append)
    assert serve.asked == [("Router", "twotower", "drain", 7.0)] * 4 and not said


def test_where_no_router_runs_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    serve, said = Serve(monkeypatch, routers=0), list[str]()
    draining.finish(b"ours", 7.0, said.append)
    assert not serve.asked and not said


def test_routers_that_cannot_be_asked_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    serve, said = Serve(monkeypatch), list[str]()
    monkeypatch.setattr(serve, "results", lambda: 1 / 0)
    draining.finish(b"ours", 7.0, said.append)
    assert said == ["not all routers have finished their requests: ZeroDivisionError: division by zero"]


def test_a_router_that_did_not_hear_is_asked_again_and_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve leaves out those that are unavailable for a moment, and returns what goes wrong with one. A dead one has
    nothing to finish."""
    serve, said = Serve(monkeypatch), list[str]()
    answers: list[list[Any]] = [[], [RuntimeError("busy"), None], [None, ActorDiedError()]]
    monkeypatch.setattr(serve, "results", lambda: answers.pop(0))
    draining.finish(b"ours", 7.0, said.append)
    assert len(serve.asked) == 3 and not said
    monkeypatch.setattr(draining, "_SLACK_S", 0.0)
    monkeypatch.setattr(serve, "results", lambda: [RuntimeError("busy")])
    draining.finish(b"ours", 0.05, said.append)
    assert said == ["not all routers have finished their requests: RuntimeError: busy"]
