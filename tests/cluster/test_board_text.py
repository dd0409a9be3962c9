"""`status --address` and `--watch`: the ops page's data in a terminal."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.board.feed import Feed
from cluster.cli import status
from cluster.cli.board_text import BoardText
from cluster.cli.board_words import bar, nbytes, number, percent, seconds, spark
from cluster.cli.main import main
from cluster.cli.status import Snapshots
from tests.cluster.board.signed import Hearing, beat
from twotower.core import Mode
from twotower.errors import Unavailable


async def told_by(hearing: Hearing) -> bytes:
    return (await Feed(hearing.board).now()).encoded()


class Answering:
    """Answers every GET with `body`, and keeps the paths."""

    def __init__(self) -> None:
        self.body, self.code, self.paths = b"{}", 200, list[str]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.paths.append(self.path)
                self.send_response(outer.code)
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"


@pytest.fixture
def answering() -> Iterator[Answering]:
    made = Answering()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


async def test_what_is_wrong_is_on_top(answering: Answering, capsys: pytest.CaptureFixture[str]) -> None:
    hearing = Hearing(heard=[beat("a"), beat("b")])
    hearing.tick(5)
    hearing.heard[0] = beat("a", (Mode.AR,), 0.5)
    hearing.tick(13)
    answering.body = await told_by(hearing)
    assert main(["status", "--address", answering.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("TwoTower Serve · demo") and lines[1] == "✕ act  no denoiser in cell a, since 12 s"
    [cell] = [line for line in lines if line.startswith("a ")]
    assert "✕ ar only" in cell and "3 of 8, 1 wait" in cell and "25 %" in cell
    [denoiser] = [line for line in lines if " denoiser  " in line][:1]
    assert "75 %" in denoiser and "commits 12 %, work 12 %" in denoiser
    assert "\033[" not in "".join(lines), "no colours where there is no terminal"


async def test_all_is_well_and_every_line_fits(answering: Answering) -> None:
    hearing = Hearing(heard=[beat(f"cell{number}") for number in range(40)])
    hearing.tick(30)
    told = json.loads(await told_by(hearing))
    lines = BoardText(80, colour=False).lines(told, "127.0.0.1:8000")
    assert lines[1] == "✓ All is well: 40 cells serve diffusion, mock_ar, ar, verified, auto"
    assert max(map(len, lines)) <= 80
    coloured = BoardText(80, colour=True).lines(told, "x")
    assert coloured[1] == f"\033[1;32m{lines[1]}\033[0m"


async def test_a_watch_asks_for_the_news_and_says_when_there_are_none(
    answering: Answering, capsys: pytest.CaptureFixture[str]
) -> None:
    hearing, seen = Hearing(heard=[beat("a")]), 0
    hearing.tick(60)
    answering.body = await told_by(hearing)

    def pace(wanted_s: float) -> None:
        nonlocal seen
        seen += 1
        answering.code = 503 if seen == 2 else 200
        if seen == 3:
            raise KeyboardInterrupt

    assert status.watch(Snapshots(answering.address), pace) == 0
    out = capsys.readouterr().out
    assert out.count("✓ All is well") == 3 and out.count("✕ no answer for") == 1 and "answers 503" in out
    assert answering.paths[1] == f"/ops/snapshot?since={1060 - 15}"


def test_points_are_kept_once(answering: Answering) -> None:
    first = {"at": 100.0, "alerts": [], "fine": [[98, 1.0], [99, 2.0]], "events": [{"t": 1.0, "text": "x", "count": 1}]}
    answering.body = json.dumps(first).encode()
    snapshots = Snapshots(answering.address)
    snapshots.next()
    events = [{"t": 1.0, "text": "x", "count": 2}]
    answering.body = json.dumps(first | {"fine": [[99, 3.0], [100, 4.0]], "events": events}).encode()
    told = snapshots.next()
    assert told["fine"] == [[98, 1.0], [99, 3.0], [100, 4.0]] and told["events"] == events


@pytest.mark.parametrize(
    ("code", "body", "exit_code", "says"),
    [
        (404, b"", 2, "has no ops page; wanted a service with ingress.ops_page: true"),
        (200, b"[]", 1, "is not a snapshot of ours"),
        (200, b"<html>", 1, "no service answers"),
    ],
)
def test_what_is_no_ops_page(
    answering: Answering, capsys: pytest.CaptureFixture[str], code: int, body: bytes, exit_code: int, says: str
) -> None:
    answering.code, answering.body = code, body
    assert main(["status", "--address", answering.address]) == exit_code
    told = capsys.readouterr()
    assert says in told.err and told.out == ""


def test_two_services_at_a_time_are_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--address", "127.0.0.1:1", "--http-port", "8000"]) == 2
    assert "--http-port: got --address too" in capsys.readouterr().err
    with pytest.raises(Unavailable):
        Snapshots("127.0.0.1:1").next()


def test_words() -> None:
    assert [number(value) for value in (None, 0.0, 3.14159, 31.4159, 3141.59)] == ["–", "0", "3.14", "31.4", "3,142"]
    assert [nbytes(value) for value in (0, 999, 1500, 2.1e9)] == ["0 B", "999 B", "1.50 kB", "2.10 GB"]
    assert [seconds(value) for value in (0.25, 2.5, 42, 200, 7300)] == [
        "250 ms",
        "2.5 s",
        "42 s",
        "3 min 20 s",
        "2 h 1 min",
    ]
    assert (percent(0.256), percent(None)) == ("26 %", "–")
    assert [bar(share, 4) for share in (0.0, 0.5, 0.53, 1.0, 2.0)] == ["░░░░", "██░░", "██▏░", "████", "████"]
    assert spark([0.0, 1.0, None, 2.0], 4) == "▁▅ █" and spark([1.0, 3.0, None, None], 2) == "█ " and spark([], 5) == ""
