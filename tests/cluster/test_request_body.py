"""Bodies of HTTP requests: compressed ones, too big ones, ones that never arrive."""

import asyncio
import gzip
import json
import threading
import tracemalloc
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest

from cluster.faces.http import request_body
from cluster.faces.http.request_body import BodyReader
from cluster.faces.http.service import make_app
from cluster.runs.deadline import Deadline
from cluster.runs.lanes import MAX_PIECES
from tests.cluster.fakes import ScriptedCells, all_modes, generation

BODY = json.dumps({"prompt": "Hi", "max_tokens": 4}).encode()
GZIPPED = gzip.compress(BODY, mtime=0)  # it names tests, which are the same in every process


def client(cells: ScriptedCells, max_bytes: int = 10_000, body_timeout_s: float = 30.0) -> httpx.AsyncClient:
    app = make_app(generation(cells), all_modes, max_bytes, body_timeout_s)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fake")


async def post(http: httpx.AsyncClient, body: object, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await http.post("/v1/completions", content=body, headers=named)  # type: ignore[arg-type]


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", GZIPPED),
        ("X-Gzip", GZIPPED),
        ("deflate", zlib.compress(BODY)),
        ("identity", BODY),
    ],
)
async def test_compressed_bodies_are_read(cells: ScriptedCells, encoding: str, body: bytes) -> None:
    async with client(cells) as http:
        assert (await post(http, body, content_encoding=encoding)).status_code == 200
    assert cells.requests[0].params.max_new_tokens == 4


@pytest.mark.parametrize("encoding", ["zstd", "br", "gzip, gzip", "x" * 900])
async def test_other_encodings_are_named_with_those_that_are_read(cells: ScriptedCells, encoding: str) -> None:
    async with client(cells) as http:
        status, param, message = error_of(await post(http, b"?", content_encoding=encoding))
    assert (status, param) == (415, "content-encoding")
    assert encoding[:20] in message and "wanted one of gzip, deflate, identity" in message and len(message) < 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (BODY, "body: not gzip, which content-encoding says"),
        (GZIPPED[:-9], "body: ends before its gzip data does"),
        (GZIPPED + b"more", "body: goes on after the end of its gzip data"),
        (b"", "body: ends before its gzip data does"),
    ],
)
async def test_broken_compression_is_named(cells: ScriptedCells, body: bytes, message: str) -> None:
    async with client(cells) as http:
        status, param, got = error_of(await post(http, body, content_encoding="gzip"))
    assert (status, param) == (400, "body") and got.startswith(message)


async def test_few_bytes_that_stand_for_many_are_refused_without_being_unpacked(cells: ScriptedCells) -> None:
    bomb = gzip.compress(bytes(200 * 2**20), compresslevel=1)
    async with client(cells, max_bytes=2**20) as http:
        tracemalloc.start()
        try:
            status, param, _ = error_of(await post(http, bomb, content_encoding="gzip"))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (status, param) == (400, "body") and peak < 20 * 2**20


async def test_compressed_bytes_that_stand_for_nothing_are_bounded_too(cells: ScriptedCells) -> None:
    packing = zlib.compressobj(wbits=31)
    nothing = packing.flush(zlib.Z_FULL_FLUSH) + b"\x00\x00\x00\xff\xff" * 10_000  # empty stored blocks
    async with client(cells) as http:
        status, param, message = error_of(await post(http, nothing, content_encoding="gzip"))
    assert (status, param) == (400, "body") and "10000 bytes" in message


async def endless(part: bytes, pause_s: float) -> AsyncIterator[bytes]:
    while True:
        yield part
        await asyncio.sleep(pause_s)


async def test_a_body_that_does_not_arrive_in_time_is_408(cells: ScriptedCells) -> None:
    async with client(cells, body_timeout_s=0.05) as http:
        response = await post(http, endless(b" ", 0.02))
    assert error_of(response) == (408, "body", "body: not complete within 0.05 s of the headers")
    assert response.headers["connection"] == "close"


async def test_the_requests_own_deadline_holds_while_its_body_arrives(cells: ScriptedCells) -> None:
    async with client(cells) as http:
        response = await post(http, endless(b" ", 0.02), x_request_timeout="0.05")
    assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["message"] == "not finished within 0.05 s"


async def test_a_body_said_to_be_too_big_is_refused_unread(cells: ScriptedCells) -> None:
    async with client(cells) as http:
        response = await post(http, endless(b" ", 60), content_length="10001")
    assert error_of(response) == (400, "body", "body: got more than 10000 bytes, wanted at most that many")


@pytest.mark.parametrize("bound", ["MAX_BODIES", "_BODIES_HELD"])
async def test_bodies_that_stay_do_not_keep_the_router_from_answering(
    cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(request_body, bound, 4)
    monkeypatch.setattr(request_body, "_BODIES_HELD" if bound == "MAX_BODIES" else "MAX_BODIES", 100)
    async with client(cells) as http:
        stuck = [asyncio.create_task(post(http, endless(b" " * 9000, 60))) for _ in range(4)]
        await asyncio.sleep(0.02)
        assert (await http.get("/health")).status_code == 200
        response = await post(http, b" " * 9000)
        assert response.status_code == 429 and "arriving" in response.json()["error"]["message"]
        assert int(response.headers["retry-after"]) >= 1
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
        assert (await post(http, BODY)).status_code == 200


@pytest.mark.parametrize("bound", ["MAX_BODIES", "_BODIES_HELD"])
async def test_one_client_does_not_take_the_places_of_others(
    cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(request_body, bound, 8)
    app = make_app(generation(cells), all_modes, 10_000)
    greedy, modest = (
        httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(address, 1)), base_url="http://fake")
        for address in ("10.0.0.1", "10.0.0.2")
    )
    async with greedy, modest:
        stuck = [asyncio.create_task(post(greedy, endless(b" " * 9000, 60))) for _ in range(20)]
        async with asyncio.timeout(10):
            while sum(task.done() for task in stuck) < 14:  # it holds six of eight
                await asyncio.sleep(0.001)
        refused = next(task for task in stuck if task.done()).result()
        assert refused.status_code == 429 and "of one caller" in refused.json()["error"]["message"]
        assert (await post(modest, BODY.ljust(9000))).status_code == 200
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
        assert (await post(greedy, BODY)).status_code == 200


@dataclass
class Jammed:
    """A service whose threads are busy until `go_on`: bodies are read, and wait to be parsed."""

    http: httpx.AsyncClient
    reader: BodyReader
    go_on: threading.Event

    async def waits(self, count: int) -> list["asyncio.Task[httpx.Response]"]:
        """So many requests whose bodies are whole and wait."""
        tasks = [asyncio.create_task(post(self.http, BODY)) for _ in range(count)]
        while self.reader.held < count * len(BODY):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        assert self.reader.held == count * len(BODY)
        return tasks


@asynccontextmanager
async def jammed(cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Jammed, None]:
    readers, go_on = list[BodyReader](), threading.Event()

    def reader(max_bytes: int, timeout_s: float) -> BodyReader:
        readers.append(BodyReader(max_bytes, timeout_s))
        return readers[0]

    monkeypatch.setattr("cluster.faces.http.service.BodyReader", reader)
    monkeypatch.setattr("cluster.faces.http.calls.PARSED_S", 1.0)  # every body is long
    service = generation(cells)
    app = make_app(service, all_modes, 10_000)
    begun, loop = asyncio.Event(), asyncio.get_running_loop()

    def work() -> bool:
        loop.call_soon_threadsafe(begun.set)
        return go_on.wait(60)

    busy = asyncio.create_task(service.lanes.run(1.0, work, Deadline.after(60)))
    try:
        await begun.wait()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fake") as http:
            yield Jammed(http, readers[0], go_on)
            assert readers[0].held == 0
    finally:
        go_on.set()
        await busy


async def test_a_body_counts_until_it_is_parsed(cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch) -> None:
    async with jammed(cells, monkeypatch) as service:
        tasks = await service.waits(3)
        service.go_on.set()
        assert [(await task).status_code for task in tasks] == [200] * 3


async def test_a_body_counts_no_longer_once_its_request_is_refused(
    cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with jammed(cells, monkeypatch) as service:
        broken = asyncio.create_task(post(service.http, b"{"))
        await asyncio.sleep(0.02)
        assert service.reader.held == 1
        service.go_on.set()
        assert (await broken).status_code == 400


async def test_a_body_whose_deadline_passes_counts_no_longer_at_once(
    cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with jammed(cells, monkeypatch) as service:
        late = await post(service.http, BODY, x_request_timeout="0.05")
        assert late.status_code == 504
        assert service.reader.held == 0 and not service.go_on.is_set()


async def test_a_body_whose_client_leaves_counts_no_longer_at_once(
    cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with jammed(cells, monkeypatch) as service:
        tasks = await service.waits(2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert service.reader.held == 0 and not service.go_on.is_set()


async def test_bodies_that_wait_to_be_parsed_are_bounded_too(
    cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_body, "MAX_BODIES", 4)
    async with jammed(cells, monkeypatch) as service:
        tasks = await service.waits(3)
        refused = await post(service.http, BODY)
        assert refused.status_code == 429 and "bodies of requests that are arriving: 4 at a time of" in refused.text
        service.go_on.set()
        assert [(await task).status_code for task in tasks] == [200] * 3


async def test_more_bodies_than_a_lane_has_places_are_refused(
    cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with jammed(cells, monkeypatch) as service:
        tasks = await service.waits(MAX_PIECES - 1)  # and the one that the thread is at
        refused = await post(service.http, BODY)
        assert refused.status_code == 429 and "256 pieces of work" in refused.text
        assert int(refused.headers["retry-after"]) >= 1
        assert service.reader.held == (MAX_PIECES - 1) * len(BODY)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_body_that_breaks_off_counts_no_longer(cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch) -> None:
    async with jammed(cells, monkeypatch) as service:
        stuck = asyncio.create_task(post(service.http, endless(b" " * 100, 60)))
        await asyncio.sleep(0.02)
        assert service.reader.held == 100
        stuck.cancel()
        await asyncio.gather(stuck, return_exceptions=True)
        tasks = [await post(service.http, BODY * 999), await post(service.http, BODY, content_encoding="gzip")]
        assert [task.status_code for task in tasks] == [400, 400]
