"""Scraped under load, the numbers are those that the clients of both faces have counted. What is deployed to watch them
does: alerts fire on live faults, and panels show something."""

import asyncio
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import grpc
import httpx
import pytest

from benchmarks.reference.service import free_port
from cluster.ops.scraping import targets
from cluster.watch import cell_metrics, router_metrics
from cluster.watch.metric import Kind, declared_in
from tests.cluster.scraped import LATE_S, Scrape, scrape, scraped
from tests.cluster.service import Service, running_service
from tests.deploy.observability import ALERTS, RULES, loaded, panel_queries
from tests.deploy.promql import selectors
from tests.prometheus import Prometheus, require, running_prometheus
from twotower.core import COSTS
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

MODEL = "scraped by a test"  # the exporter keeps what other services of this Ray have told
MODES = ("diffusion", "mock_ar", "ar", "verified", "auto")
ROUTERS = 2
# Those of keys and certificates, and of a run that goes on after a loss, which other tests see.
OF_FILES = {router_metrics.KEY_LIMITS, router_metrics.CERTIFICATE_LEFT, router_metrics.FILE_FAULT}
ELSEWHERE = {router_metrics.PAUSE, *OF_FILES}
NOT_ASKED_FOR = {metric.shown_name for metric in OF_FILES}


@pytest.fixture(scope="module")
def service(ray_cluster: None) -> Iterator[Service]:
    # Whichever router the calls come to, it has room for all of them.
    cluster = {"num_routers": ROUTERS, "max_queued_requests": 256}
    with running_service(model={"name": MODEL}, cluster=cluster) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def prometheus(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus | None]:
    """From the first test on: an increase is seen only by who looked before it. None where it is not installed."""
    if shutil.which("prometheus") is None:
        yield None
        return
    directory, address = tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{free_port()}"
    with running_prometheus(directory, address, targets(), without_patience()) as running:
        yield running


def without_patience() -> dict[str, Any]:
    """Our rules, which here fire at once, and for waits of a second."""
    rules: dict[str, Any] = loaded(ALERTS)
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        rule["for"] = "0s"
        if rule["alert"] == "TwoTowerQueueGrows":
            assert rule["expr"].endswith(" > 10")
            rule["expr"] = rule["expr"].removesuffix("0")
    return rules


async def fires(prometheus: Prometheus, alert: str) -> dict[str, str]:
    """What an operator is told once it does."""
    began = time.monotonic()
    while True:
        firing = await prometheus.firing(MODEL)
        if alert in firing:
            return firing[alert]
        assert time.monotonic() - began < LATE_S, f"{alert} does not fire, but {sorted(firing)}"
        await asyncio.sleep(0.2)


async def empty_panels(prometheus: Prometheus) -> list[str]:
    """That show nothing however often one looks: after a scrape that failed all gauges are empty until the next."""
    began, empty = (
        time.monotonic(),
        [one for one in panel_queries(MODEL, "1m") if not any(name in one[1] for name in NOT_ASKED_FOR)],
    )
    while True:
        answers = await asyncio.gather(*(prometheus.query(query) for _, query in empty))
        empty = [one for one, answer in zip(empty, answers, strict=True) if not answer]
        if not empty or time.monotonic() - began > LATE_S:
            return [title for title, _ in empty]
        await asyncio.sleep(0.5)


class Counted:
    """What clients have got: by name and mode."""

    def __init__(self) -> None:
        self.of: dict[str, Counter[str]] = {name: Counter() for name in ("ended", "cut", "prompt", "tokens", *COSTS)}

    def answered(self, mode: str, prompt: int, usage: Any) -> None:
        self.of["ended"][mode] += 1
        self.of["prompt"][mode] += prompt
        self.of["tokens"][mode] += usage["completion_tokens"]
        for name in COSTS:
            self.of[name][mode] += usage[name]


def length(number: int, mode: str) -> int:
    """What random weights draft does not stand, so most rounds have no draft: there are more of them."""
    return 8 + number + (32 if mode in ("verified", "auto") else 0)


async def by_http(http: httpx.AsyncClient, counted: Counted, number: int, mode: str) -> None:
    """Two prompts of one call, which are two requests."""
    prompts = [[5 + number, 6, 7], [8, 9]]
    body = {"prompt": prompts, "max_tokens": length(number, mode), "ignore_eos": True, "diffusion": {"mode": mode}}
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    counted.answered(mode, sum(map(len, prompts)), response.json()["usage"])
    counted.of["ended"][mode] += 1


async def by_grpc(stub: pb_grpc.GenerationServiceStub, counted: Counted, number: int, mode: str) -> None:
    params = pb.DecodingParams(mode=f"MODE_{mode.upper()}", max_new_tokens=length(number, mode), ignore_eos=True)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6 + number]), params=params)
    usage = [event async for event in stub.GenerateStream(request)][-1].finished.usage
    told = {name: getattr(usage, name) for name in ("completion_tokens", *COSTS)}
    counted.answered(mode, 2, told)


async def left(stub: pb_grpc.GenerationServiceStub, counted: Counted, mode: str) -> None:
    """A client that leaves after its first block."""
    params = pb.DecodingParams(mode=f"MODE_{mode.upper()}", max_new_tokens=900, ignore_eos=True)
    params.confidence_threshold = 1.0
    call = stub.GenerateStream(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), params=params))
    await call.read()
    call.cancel()
    counted.of["cut"][mode] += 1
    counted.of["prompt"][mode] += 1


async def refused(http: httpx.AsyncClient, stub: pb_grpc.GenerationServiceStub) -> None:
    assert (await http.post("/v1/completions", json={"prompt": [5], "max_tokens": 5000})).status_code == 400
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5_000_000])))


async def scored(stub: pb_grpc.GenerationServiceStub, counted: Counted) -> None:
    prompt, continuation = pb.TokenIds(ids=[5, 6]), pb.TokenIds(ids=[7, 8, 9])
    await stub.Score(pb.ScoreRequest(prompt_token_ids=prompt, continuation_token_ids=continuation))
    counted.of["ended"]["score"] += 1
    counted.of["prompt"]["score"] += 5


def ended(found: Scrape) -> float:
    return found.total(router_metrics.SUCCESS) + found.total(router_metrics.FAILURE)


async def test_a_scrape_agrees_with_what_clients_counted(service: Service) -> None:
    counted, watched = Counted(), [await scrape(MODEL)]

    async def watching() -> None:
        while True:
            watched.append(await scrape(MODEL))
            await asyncio.sleep(1.0)

    async with (
        httpx.AsyncClient(base_url=f"http://{service.http}", timeout=60) as http,
        grpc.aio.insecure_channel(service.grpc) as channel,
    ):
        stub = pb_grpc.GenerationServiceStub(channel)
        watch = asyncio.create_task(watching())
        calls = []
        for number in range(6):
            for mode in MODES:
                calls += [by_http(http, counted, number, mode), by_grpc(stub, counted, number, mode)]
            calls += [scored(stub, counted), left(stub, counted, "diffusion"), refused(http, stub)]
        await asyncio.gather(*calls)
        await service.all_free()
        watch.cancel()
        of = counted.of
        requests = sum(of["ended"].values()) + sum(of["cut"].values())
        found = await scraped(MODEL, lambda now: ended(now) >= requests)

    for mode in (*MODES, "score"):
        assert found.total(router_metrics.SUCCESS, mode=mode) == of["ended"][mode]
        assert found.total(router_metrics.PROMPT_TOKENS, mode=mode) == of["prompt"][mode]
        for histogram in (router_metrics.LATENCY, router_metrics.QUEUE_TIME, router_metrics.FIRST_TOKEN):
            cut = 0 if histogram is router_metrics.LATENCY else of["cut"][mode]
            assert found.total(histogram, "_count", mode=mode) == of["ended"][mode] + cut, histogram.name
    for mode in ("mock_ar", "ar", "verified", "auto"):
        assert found.total(router_metrics.TOKENS, mode=mode) == of["tokens"][mode]
        assert found.total(router_metrics.BLOCKS, mode=mode) == of["num_blocks"][mode]
    assert found.total(router_metrics.AUTO_BLOCKS) == of["num_blocks"]["auto"] > 0
    assert found.total(router_metrics.AUTO_BLOCKS, chosen="ar") == of["num_ar_blocks"]["auto"]
    assert found.total(router_metrics.DRAFTED) == of["num_drafted"]["verified"] > 0
    assert found.total(router_metrics.ACCEPTED) == of["num_accepted"]["verified"]
    assert found.total(router_metrics.DRAFT_STEPS) == of["num_steps"]["verified"]
    assert found.total(router_metrics.DRAFTS) == of["num_blocks"]["verified"]
    assert found.total(router_metrics.FAILURE, mode="diffusion", code="CANCELLED") == of["cut"]["diffusion"]
    assert found.total(router_metrics.REFUSED, code="INVALID_ARGUMENT") == 12
    # Of those who left the service knows more than they: what was on its way to them.
    for metric, name in ((router_metrics.TOKENS, "tokens"), (router_metrics.BLOCKS, "num_blocks")):
        assert found.total(metric, mode="diffusion") >= of[name]["diffusion"] + of["cut"]["diffusion"]
    assert found.total(router_metrics.STEPS) > of["num_steps"]["diffusion"]
    assert found.total(router_metrics.COMMITTED) == found.total(router_metrics.TOKENS, mode="diffusion")
    assert found.total(router_metrics.BLOCK_STEPS, "_count") >= of["num_blocks"]["diffusion"]
    told = [labels for name, labels, _ in found.samples if name == router_metrics.SUCCESS.shown_name]
    assert len({labels["WorkerId"] for labels in told}) == ROUTERS, "each router for itself"
    assert all(ended(one) <= ended(later) for one, later in pairwise(watched)), "never less"
    assert ended(watched[0]) < requests


async def test_towers_and_cells(service: Service) -> None:
    """All that is declared is there, and gauges are those of the cell itself."""
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        stub, counted = pb_grpc.GenerationServiceStub(channel), Counted()
        await asyncio.gather(*(by_grpc(stub, counted, 60, mode) for mode in MODES))
    await service.all_free()
    stats = {tower.tower: tower for tower in (await service.stats()).towers}
    denoiser = stats["denoiser"]

    def arrived(now: Scrape) -> bool:
        ticks = [now.total(cell_metrics.TICKS, tower=name) for name in stats]
        return ticks == [tower.ticks for tower in stats.values()] and bool(now.values(router_metrics.READY))

    found = await scraped(MODEL, arrived)
    for name, tower in stats.items():
        assert found.total(cell_metrics.TICKS, tower=name) == tower.ticks
        assert found.total(cell_metrics.ROWS, tower=name) == tower.rows
        assert found.total(cell_metrics.BUSY, tower=name) == pytest.approx(tower.busy_s)
        assert found.total(cell_metrics.SLOTS, tower=name) == tower.total_slots
        assert found.values(cell_metrics.CACHE_USED, tower=name) == [0.0]
    assert found.total(cell_metrics.EXCHANGED) == denoiser.exchange_bytes > 1000
    assert found.total(cell_metrics.EXPOSED, reason="commit") == pytest.approx(denoiser.held_up_s)
    assert denoiser.held_up_s > 0 < denoiser.prompt_wait_s
    assert found.values(router_metrics.READY) == [1.0] * ROUTERS
    assert found.values(router_metrics.CELLS, mode="diffusion") == [1.0] * ROUTERS
    assert sorted(found.values(router_metrics.WAITING)) == [0.0] * (ROUTERS + 1)
    assert found.values(cell_metrics.RUNNING) == [0.0] == found.values(cell_metrics.MENDING)
    for metric in {*declared_in(vars(router_metrics)), *declared_in(vars(cell_metrics))} - ELSEWHERE:
        part = "_count" if metric.kind is Kind.HISTOGRAM else ""
        assert found.values(metric, part), f"{metric.shown_name} is declared and not scraped"
        labels = [has for name, has, _ in found.samples if name == metric.shown_name + part]
        assert all(set(metric.labels) <= has.keys() for has in labels), metric.name


async def test_a_tower_that_is_lost_and_mended(service: Service, prometheus: Prometheus | None) -> None:
    """The request that it cost a pause is counted, the mend too; and what the lost tower has done stays counted."""
    before = await scrape(MODEL)
    if prometheus is not None:
        assert "TwoTowerResumes" not in await prometheus.firing(MODEL)
    params = pb.DecodingParams(mode="MODE_DIFFUSION", max_new_tokens=900, ignore_eos=True, confidence_threshold=1.0)
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        call = pb_grpc.GenerationServiceStub(channel).GenerateStream(
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]), params=params)
        )
        killed = False
        async for event in call:
            if event.block.start and not killed:
                os.kill(int((await service.stats()).homes[1]["pid"]), signal.SIGKILL)
                killed = True
    found = await scraped(MODEL, lambda now: now.total(cell_metrics.MENDED) == 1)
    assert found.values(cell_metrics.MENDED) == [1.0] and before.values(cell_metrics.MENDED) == [0.0]
    found = await scraped(MODEL, lambda now: bool(now.values(router_metrics.PAUSE, "_count")))
    assert found.total(router_metrics.PAUSE, "_count") == 1
    assert found.total(router_metrics.MOVES, reason="cell_lost") == 1
    assert found.total(router_metrics.REPLAYED, mode="diffusion") >= 1
    assert found.total(cell_metrics.TICKS, tower="denoiser") > before.total(cell_metrics.TICKS, tower="denoiser")
    assert len(found.values(cell_metrics.TICKS, tower="denoiser")) == 1, "one tower, whoever stands for it"
    asked = {selector.name for query in queries() for selector in selectors(query)}
    asked -= NOT_ASKED_FOR
    assert asked <= {name for name, _, _ in found.samples}, "what alerts and panels ask for is there"
    assert all(labels.keys() >= {"NodeAddress", "WorkerId"} for _, labels, _ in found.samples), "alerts name the node"


def queries() -> list[str]:
    return [*(rule["expr"] for rule in RULES), *(query for _, query in panel_queries())]


async def test_what_is_deployed_to_watch_it(service: Service, prometheus: Prometheus | None) -> None:
    """One alert is on the loss above, one on a queue that grows now. No panel is empty."""
    if prometheus is None:
        require("prometheus")
    assert prometheus is not None
    assert f"requests to {MODEL} had to go on" in (await fires(prometheus, "TwoTowerResumes"))["description"]
    assert "TwoTowerQueueGrows" not in await prometheus.firing(MODEL)
    params = pb.DecodingParams(mode="MODE_DIFFUSION", max_new_tokens=900, ignore_eos=True, confidence_threshold=1.0)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]), params=params)
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        calls = [pb_grpc.GenerationServiceStub(channel).GenerateStream(request) for _ in range(40)]
        told = await fires(prometheus, "TwoTowerQueueGrows")
        for call in calls:
            call.cancel()
    assert f"Requests to {MODEL} wait for" in told["summary"]
    assert await empty_panels(prometheus) == []
    await service.all_free()
