"""The benchmark of transports: every candidate that is installed carries runs whole; the others are named."""

import asyncio
from pathlib import Path

import pytest

from benchmarks.transport import main
from benchmarks.transport_parts import variants
from benchmarks.transport_parts.seam import Gone, Runs
from benchmarks.transport_parts.variants import BASELINE, VARIANTS
from twotower.core import BlockEvent, ReleasedEvent, Request, RequestId

_SHORT = ["--rounds", "1", "--seconds", "0.05", "--loop", "asyncio"]


@pytest.mark.slow  # processes of its own
@pytest.mark.parametrize("name", VARIANTS)
def test_a_candidate_carries_runs(name: str, tmp_path: Path) -> None:
    missing = VARIANTS[name].missing()
    if missing:
        pytest.skip(f"{name} needs {', '.join(missing)}")
    output = tmp_path / "new" / "report.md"
    arguments = ["--sections", "load", "--variants", name, "--clients", "1,3", *_SHORT, "--output", str(output)]
    assert main(arguments) == 0
    report = output.read_text()
    assert report.count(f"\n| `{name}` |") == 2, "a row for each number of clients"
    assert "## 3 clients on one connection" in report


@pytest.mark.slow  # processes of its own
def test_todays_way_from_an_engines_thread(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--sections", "threads,pingpong,codecs", "--variants", BASELINE, *_SHORT]) == 0
    report = capsys.readouterr().out
    assert f"\n| {BASELINE}, socket: today |" in report
    assert "\n| JSON, socket and receiver thread: today |" in report
    assert "\n| JSON, `twotower.wire` |" in report


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(variants, "find_spec", lambda name: None)
    assert main(["--quick", "--sections", "codecs", "--variants", "zmq", *_SHORT]) == 0
    told = capsys.readouterr()
    assert "left out: zmq (install pyzmq, msgspec)" in told.err
    assert "`zmq` (pyzmq, msgspec not installed)" in told.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--variants", "carrier-pigeon"],
        ["--sections", "speed"],
        ["--clients", "1,0"],
        ["--rounds", "0"],
        ["--seconds", "nan"],
    ],
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "got" in capsys.readouterr().err


async def test_a_run_nobody_reads_ends_and_leaves_the_others_alone() -> None:
    opened, cancelled = [], []
    runs = Runs(lambda run, request: opened.append(run), cancelled.append, bound=3)
    answers = [runs.ask(run, Request(RequestId(f"r-{run}"), (1,))) for run in (1, 2)]
    waiting = [asyncio.ensure_future(anext(answer)) for answer in answers]
    await asyncio.sleep(0)
    assert opened == [1, 2]
    for start in range(6):
        runs.take(1, BlockEvent(RequestId("r-1"), start, (7,), 1, 1))
    runs.take(2, ReleasedEvent(RequestId("r-2")))
    assert cancelled == [1], "once, when it was one too many"
    assert await waiting[1] == ReleasedEvent(RequestId("r-2"))
    got = [await waiting[0]]
    with pytest.raises(Gone, match="3 events wait"):
        async for event in answers[0]:
            got.append(event)
    assert [event.start for event in got if isinstance(event, BlockEvent)] == [0, 1, 2], "what had come is not lost"
    runs.lose("the connection broke")
    with pytest.raises(Gone, match="the connection broke"):
        await anext(runs.ask(3, Request(RequestId("r-3"), (1,))))
