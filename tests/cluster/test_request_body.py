"""Bodies of HTTP requests: compressed ones, too big ones, ones that never arrive."""

import asyncio
import gzip
import json
import tracemalloc
import zlib
from collections.abc import AsyncIterator

import httpx
import pytest

from cluster import request_body
from cluster.http import make_app
from tests.cluster.fakes import ScriptedCells, generation

BODY = json.dumps({"prompt": "Hi", "max_tokens": 4}).encode()


def client(cells: ScriptedCells, max_bytes: int = 10_000, body_timeout_s: float = 30.0) -> httpx.AsyncClient:
    app = make_app(generation(cells), lambda: True, max_bytes, body_timeout_s)
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
        ("gzip", gzip.compress(BODY)),
        ("X-Gzip", gzip.compress(BODY)),
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
        (gzip.compress(BODY)[:-9], "body: ends before its gzip data does"),
        (gzip.compress(BODY) + b"more", "body: goes on after the end of its gzip data"),
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
    assert error_of(response) == (408, "body", "body: not whole within 0.05 s of the headers")
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
