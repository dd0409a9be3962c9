"""Snapshots of the whole service: of all routers, once a second however many watch, and none while nobody does."""

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx
import pytest

from cluster.board import face
from cluster.board import feed as feeds
from cluster.board.face import add_ops
from cluster.board.feed import Feed
from cluster.board.part import CODEC
from cluster.board.siblings import parts_of
from cluster.faces.http.service import make_app
from tests.cluster.board.signed import Hearing, beat
from tests.cluster.fakes import ScriptedCells, all_modes, generation
from twotower.errors import Overloaded, Unavailable

Read = AsyncGenerator[bytes, None]


class Routers:
    """Asks these boards, over the message that crosses between processes; counts how often."""

    def __init__(self, *hearing: Hearing) -> None:
        self.hearing, self.asked = hearing, 0
        self.also: list[bytes] = []

    async def __call__(self, since: Mapping[str, int]) -> list[bytes]:
        self.asked += 1
        return [*self.also, *(CODEC.encode(one.board.part(since)) for one in self.hearing)]


def two_routers(seconds: int = 20) -> tuple[Hearing, Hearing]:
    first, second = Hearing("r1", heard=[beat("a")]), Hearing("r2", heard=[beat("a"), beat("b")])
    for one in (first, second):
        one.tick(seconds)
        one.board._note("failed", "request failed with UNAVAILABLE")
    return first, second


async def test_the_whole_is_of_all_routers() -> None:
    first, second = two_routers()
    whole = await Feed(first.board, Routers(first, second)).now()
    assert whole.by == "r1" and [router.name for router in whole.routers] == ["r1", "r2"]
    assert [cell.name for cell in whole.cells] == ["a", "b"]
    row = dict(zip(whole.columns, whole.fine[-1], strict=True))
    assert row["cells"] == 2 and row["running"] == 6 and row["exchange"] == 2e6 and row["exposed"] == 0.125
    assert len(whole.fine) == 18, "the last two seconds may not have been told by all"
    assert [(event.text, event.count) for event in whole.events if event.kind == "failed"] == [
        ("request failed with UNAVAILABLE", 2)
    ]


async def test_a_router_that_is_gone_leaves_its_history() -> None:
    first, second = two_routers()
    second.board.observer._counts["tokens"] += 600
    second.tick()
    first.tick()
    routers = Routers(first, second)
    feed = Feed(first.board, routers)
    assert len((await feed.now()).routers) == 2
    routers.hearing = (first,)
    feed._collected_at = float("-inf")
    first.tick(3)
    whole = await feed.now()
    tokens = whole.columns.index("tokens")
    assert len(whole.routers) == 1 and max(row[tokens] or 0 for row in whole.fine) == 600


async def test_a_router_that_starts_takes_the_histories_over() -> None:
    first, second = two_routers()
    second.board.hear(first.part().histories)
    third = Hearing("r3", now=first.now)
    await Feed(third.board, Routers(second)).adopt()
    assert {name: history.last for name, history in third.board.past.items()} == {
        "r1": first.board.history.last,
        "r2": second.board.history.last,
    }
    assert third.board.past["r1"].fine == first.board.history.fine


async def test_one_that_does_not_answer_or_speaks_otherwise_is_left_out() -> None:
    first, second = two_routers()
    routers = Routers(first, second)
    routers.also = [b"what is this", CODEC.encode(second.part())[:40]]
    assert [part.router.name for part in await parts_of(routers, {}, "r1")] == ["r2"]

    async def fails(since: Mapping[str, int]) -> list[bytes]:
        raise RuntimeError("Serve is gone")

    assert len((await Feed(first.board, fails).now()).routers) == 1


async def test_however_many_ask_routers_are_asked_once_a_second() -> None:
    first, second = two_routers()
    routers = Routers(first, second)
    feed = Feed(first.board, routers)
    await asyncio.gather(*(feed.now() for _ in range(20)))
    assert routers.asked == 1


async def test_what_is_asked_from_then_on() -> None:
    first, _ = two_routers(60)
    whole = await Feed(first.board).now(since=1035)
    assert [row[0] for row in whole.fine] == list(range(1035, 1058)), "1058 and 1059 may not have been told by all"
    assert [row[0] for row in whole.coarse] == [1030, 1040]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "PACE_S", 0.005)


async def test_a_watcher_gets_all_and_then_what_is_new(quick: None) -> None:
    hearing = Hearing(heard=[beat("a")])
    hearing.tick(40)
    watching = Feed(hearing.board).watch()
    async with asyncio.timeout(5):
        whole, news = [json.loads((await anext(watching)).body) for _ in range(2)]
    assert len(whole["fine"]) == 38 and whole["cells"] == news["cells"]
    await watching.aclose()


async def test_nobody_watches_nobody_is_asked(quick: None) -> None:
    hearing = Hearing(heard=[beat("a")])
    routers = Routers(hearing)
    feed = Feed(hearing.board, routers)
    watching = feed.watch()
    async with asyncio.timeout(5):
        await anext(watching)
        await anext(watching)
        await watching.aclose()
        assert feed._pushing is not None
        await feed._pushing
    asked = routers.asked
    await asyncio.sleep(0.03)
    assert routers.asked == asked > 1


async def test_a_slow_watcher_is_dropped_and_others_are_not(quick: None) -> None:
    feed = Feed(Hearing(heard=[beat("a")]).board)
    slow, quick_one = feed.watch(), feed.watch()
    read = 0
    async with asyncio.timeout(5):
        await anext(slow)
        while len(feed._watchers) != 1 or not read:
            await anext(quick_one)
            read += 1
        rest = [message async for message in slow]
        await anext(quick_one)
    assert len(rest) == feeds._BEHIND and read > feeds._BEHIND
    await quick_one.aclose()


async def test_streams_end_with_time_and_where_the_router_is_taken_away(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = False
    feed = Feed(Hearing(heard=[beat("a")]).board, leaves=lambda: leaves)
    async with asyncio.timeout(5):
        watching = feed.watch()
        for _ in range(3):
            await anext(watching)
        leaves = True
        assert len([message async for message in watching]) < 3
        leaves = False
        monkeypatch.setattr(feeds, "LIFE_S", 0.02)
        assert len([message async for message in feed.watch()]) < 10


async def test_watchers_are_bounded_and_end_with_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MOST_WATCHERS", 2)
    feed = Feed(Hearing(heard=[beat("a")]).board)
    watching = [feed.watch() for _ in range(2)]
    for one in watching:
        await anext(one)
    with pytest.raises(Overloaded, match="2 watch the ops page"):
        await anext(feed.watch())
    feed.stop()
    assert [[message async for message in one] for one in watching] == [[], []]
    with pytest.raises(Unavailable):
        await anext(feed.watch())


def app_of(feed: Feed) -> httpx.AsyncClient:
    app = make_app(generation(ScriptedCells()), all_modes)
    add_ops(app, feed)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fake")


async def test_the_snapshot_over_http() -> None:
    first, second = two_routers()
    async with app_of(Feed(first.board, Routers(second))) as http:
        response = await http.get("/ops/snapshot")
        wrong = await http.get("/ops/snapshot", params={"since": "-1"})
        posted = await http.post("/ops/snapshot")
    body: Any = response.json()
    assert response.status_code == 200 and response.headers["cache-control"] == "no-store"
    assert body["cells"][0]["towers"][1]["busy"] == 0.75 and body["alerts"][0]["level"] == "act"
    assert wrong.status_code == 400 and "since" in wrong.text and posted.status_code == 405


async def streamed(app: Any, headers: Mapping[str, str], messages: int) -> tuple[int, list[str]]:
    """The status and the first events of a stream, whose client leaves then."""
    sent, left = list[Any](), asyncio.Event()

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > messages:
            left.set()

    async def receive() -> dict[str, str]:
        await left.wait()
        return {"type": "http.disconnect"}

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": "/ops/stream", "headers": raw, "query_string": b""}
    async with asyncio.timeout(5):
        await app(scope, receive, send)
    return sent[0]["status"], [message["body"].decode() for message in sent[1:]]


async def test_a_browser_s_stream(quick: None) -> None:
    hearing = Hearing(heard=[beat("a")])
    hearing.tick(60)
    feed, app = Feed(hearing.board), make_app(generation(ScriptedCells()), all_modes)
    add_ops(app, feed)
    status, events = await streamed(app, {}, 3)
    assert status == 200 and events[0].startswith("retry: 1000\n\nid: 1060\ndata: {") and len(events) >= 3
    assert all(event.endswith("}\n\n") for event in events) and not feed._watchers
    _, again = await streamed(app, {"last-event-id": "1050"}, 1)
    rows = json.loads(again[0].partition("data: ")[2])["fine"]
    assert rows[0][0] == 1050 - feeds.NEWS_S, "no more than it lacks"
    status, _ = await streamed(app, {"last-event-id": "x"}, 1)
    assert status == 400


async def test_a_watcher_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face, "_WRITTEN_S", 0.01)
    feed, app = Feed(Hearing(heard=[beat("a")]).board), make_app(generation(ScriptedCells()), all_modes)
    add_ops(app, feed)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        return {}

    scope = {"type": "http", "method": "GET", "path": "/ops/stream", "headers": [], "query_string": b""}
    async with asyncio.timeout(5):
        await app(scope, receive, send)
    assert not feed._watchers


async def test_the_page_loads_nothing_and_may_run_only_its_own_script() -> None:
    async with app_of(Feed(Hearing().board)) as http:
        response = await http.get("/ops")
    html, policy = response.text, response.headers["content-security-policy"]
    assert response.headers["content-type"].startswith("text/html") and "{{" not in html
    assert not re.findall(r"""(?:src|href)=["'](?!data:|ops/|#)""", html) and "http://www.w3.org/2000/svg" in html
    assert set(re.findall(r"https?://[^\s'\"<>]+", html)) == {"http://www.w3.org/2000/svg"}
    for kind, text in (("script", html.partition('type="module">')[2]), ("style", html.partition("<style>")[2])):
        inline = text.partition(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
