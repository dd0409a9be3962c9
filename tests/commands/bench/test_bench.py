"""`python -m twotower bench` against the service's faces over scripted cells: what it sends, writes and refuses."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import http_server
from tests.cluster.fakes import ScriptedCells, all_modes, generation, grpc_server
from twotower import errors
from twotower.commands import main
from twotower.commands.bench import command
from twotower.core import AnyRequest
from twotower_client import AsyncClient


@pytest.fixture
def cells() -> ScriptedCells:
    return ScriptedCells()


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib's import takes a second: one test has it."""
    monkeypatch.setattr(command, "draw", lambda figures, path: path.write_text("a plot"))


async def bench(*arguments: str) -> int:
    return await asyncio.to_thread(main, ["bench", *arguments])


async def test_modes_and_clients_in_turns(
    cells: ScriptedCells, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ["--mode", "ar,verified,ar", "--clients", "1,3", "--requests", "4", "--rounds", "2", "--warm-up", "1"]
    load += ["--family", "words"]
    decoding = [
        "--max-new-tokens",
        "8",
        "--draft-steps",
        "3",
        "--temperature",
        "0.5",
        "--seed",
        "7",
        "--family",
        "words",
    ]
    async with grpc_server(generation(cells)) as (address, _):
        output = str(tmp_path / "run")
        code = await bench("--url", f"grpc://{address}", *load, *decoding, "--output", output, "--devices", "2")
    out, err = capsys.readouterr()
    assert code == 0, out + err
    rows = [line.split()[0] for line in out.splitlines() if line]
    assert [name for name in rows if name in ("ar", "verified")] == ["ar", "verified"] * 2
    assert "1 client " in out and "3 clients" in out and " a device" in out
    asked = [request.params for request in cells.requests]
    assert len(asked) == 2 * 2 * 2 * (4 + 1)
    assert {(one.mode, one.draft_steps, one.temperature) for one in asked} == {("ar", 2, 0.5), ("verified", 3, 0.5)}
    assert sorted({one.seed for one in asked}) == [7, 8, 9, 10]
    assert [str(one.mode) for one in asked[::5]] == ["ar", "verified"] * 2 + ["verified", "ar"] * 2, "forth and back"
    by_seed = {(request.params.seed, request.prompt_token_ids) for request in cells.requests}
    assert len(by_seed) == 4, "the same prompts in every pass"
    told = json.loads((tmp_path / "run.json").read_text())
    assert [(one["mode"], one["load"], one["requests"]) for one in told["figures"]] == [
        (mode, load, 8) for load in ("1 client", "3 clients") for mode in ("ar", "verified")
    ]
    assert told["figures"][0]["tokens_per_s_per_device"] == told["figures"][0]["tokens_per_s"]["mean"] / 2
    assert len(told["passes"]) == 8 and len(told["passes"][0]["samples"]) == 4
    _check_written(tmp_path)
    assert "run.png" in err


def _check_written(tmp_path: Path) -> None:
    markdown = (tmp_path / "run.md").read_text()
    assert "| verified |" in markdown and "- command: python -m twotower " in markdown and "seed 7" in markdown
    assert (tmp_path / "run.png").read_text() == "a plot"


@pytest.mark.parametrize("face", ["grpc", "http"])
async def test_an_open_loop_over_both_faces(
    face: str, cells: ScriptedCells, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt_token_ids": [5, 6], "answer": "x"}\n')
    load = [
        "--rate",
        "500",
        "--requests",
        "6",
        "--warm-up",
        "0",
        "--prompts",
        str(prompts),
        "--output",
        str(tmp_path / "r"),
    ]
    if face == "grpc":
        async with grpc_server(generation(cells)) as (address, _):
            assert await bench("--url", f"grpc://{address}", *load) == 0
    else:
        async with http_server(app(cells)) as address:
            assert await bench("--url", f"http://{address}", *load) == 0
    assert {request.prompt_token_ids for request in cells.requests} == {(1, 101), (5, 6)} and len(cells.requests) == 6
    told = json.loads((tmp_path / "r.json").read_text())
    [one] = told["figures"]
    assert one["load"] == "500 requests/s" and one["between_blocks"]["count"] == 6 * 9
    assert one["tokens_per_step"] == pytest.approx(len(cells.answer) / 20)
    assert "500 requests/s" in capsys.readouterr().out


def app(cells: ScriptedCells) -> Any:
    from cluster.faces.http.service import make_app

    return make_app(generation(cells), all_modes)


async def test_failures_are_counted_and_told(cells: ScriptedCells, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(request: AnyRequest, block: int) -> None:
        if block == 1 and len(cells.requests) in (3, 4):
            raise errors.NumericalError("NaN")

    cells.fail = fail
    async with grpc_server(generation(cells)) as (address, _):
        assert await bench("--url", f"grpc://{address}", "--requests", "4", "--warm-up", "1", "--family", "words") == 1
    assert "diffusion, 1 client: 2 of 4 requests failed: 2 ABORTED" in capsys.readouterr().out


async def test_what_cannot_be_served_is_told_before_anything_is_measured(
    cells: ScriptedCells, capsys: pytest.CaptureFixture[str]
) -> None:
    async with grpc_server(generation(cells, with_tokenizer=False)) as (address, _):
        assert await bench("--url", f"grpc://{address}") == 2
    async with grpc_server(generation(cells)) as (address, _):
        assert await bench("--url", f"grpc://{address}", "--max-new-tokens", "100000", "--mode", "ar") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "has no tokenizer: wanted prompt_token_ids" in first and "max_new_tokens" in second
    assert not cells.requests


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--url", "nowhere"], 2, "url: got 'nowhere', wanted grpc://HOST:PORT"),
        (["--url", "grpcs://h", "--root-certificates", "/no/ca.pem"], 2, "TLS: /no/ca.pem: No such file"),
        (["--url", "https://h", "--key", "/no/key.pem"], 2, "TLS: certificate and key: got one of them"),
        (["--root-certificates", "/no/ca.pem"], 2, "TLS: tls: got some with grpc://"),
        (["--url", "grpc://127.0.0.1:1"], 1, "grpc://127.0.0.1:1: failed to connect"),
        (["--url", "http://127.0.0.1:1"], 1, "http://127.0.0.1:1: no connection"),
        (["--clients", "0"], 2, "wanted a whole number from 1 to 4096"),
        (["--clients", "4097"], 2, "wanted a whole number from 1 to 4096"),
        (["--clients", "1", "--rate", "1"], 2, "not allowed with argument"),
        (["--rate", "nan"], 2, "wanted a number above 0 and at most 10000"),
        (["--rate", "10001"], 2, "wanted a number above 0 and at most 10000"),
        (["--requests", "100001"], 2, "wanted a whole number from 1 to 100000"),
        (["--requests", "100000", "--rounds", "11"], 2, "more than 1000000 in all passes"),
        (["--seconds", "86401"], 2, "wanted a number above 0 and at most 86400"),
        (["--rounds", "101"], 2, "wanted a whole number from 1 to 100"),
        (["--rounds", "100", "--clients", ",".join(map(str, range(1, 12)))], 2, "more than 1000 passes"),
        (["--mode", "ar,fast"], 2, "got 'fast', wanted one of diffusion"),
        (["--mode", "ar", "--draft-steps", "2"], 2, "draft_steps: has no meaning in ar"),
        (["--top-p", "7"], 2, "top_p: got 7"),
        (["--family", "sums"], 2, "--family: got 'sums', wanted one of words"),
        (["--prompts", "/no/such.txt"], 2, "--prompts: /no/such.txt: no such file"),
        (["--prompts", "{empty}"], 2, "got no prompt"),
        (["--prompts", "{wrong}"], 2, "line 2: prompt: wanted either prompt (text) or prompt_token_ids"),
        (["--output", "/no/such/run"], 2, "--output: /no/such: no such directory"),
        (["--compare", "{wrong}", "{wrong}"], 2, "not what bench --output writes"),
        (["--compare", "/no/a.json", "/no/b.json"], 2, "/no/a.json: No such file"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_line(
    arguments: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a"}\n{"promt": "a"}\n')
    files = {"empty": str(tmp_path / "empty.txt"), "wrong": str(tmp_path / "wrong.jsonl")}
    arguments = [argument.format(**files) for argument in arguments]
    try:
        ended: object = main(["bench", *arguments])
    except SystemExit as exit_:
        ended = exit_.code
    error = capsys.readouterr().err
    assert ended == code and words in error and error.count("\n") == 1, error


def test_prompts_of_text_and_of_the_demo(tmp_path: Path) -> None:
    from twotower.commands.bench.prompts import demo_prompts, file_prompts
    from twotower.demo.corpus import Instance

    path = tmp_path / "prompts.txt"
    path.write_bytes("one\r\n\ntwo ü\n".encode())
    assert sorted(map(str, file_prompts(path, 1))) == ["one", "two ü"]
    for family in (None, "words"):
        prompts = demo_prompts(family, 1)
        assert all(Instance(family or "", str(prompt), "").split == "test" for prompt in prompts)
        assert demo_prompts(family, 1) == prompts and len(prompts) >= 100


def test_two_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {name: 0.1 for name in ("count", "mean", "p50", "p90", "p99", "most")}
    one = {"load": "1 client", "mode": "ar", "rounds": 3, "requests": 10, "errors": {}, "tokens_per_step": None}
    one |= {name: times for name in ("first_token", "between_blocks", "latency")} | {"accepted_per_round": None}
    rate = {"mean": 100.0, "low": 90.0, "high": 110.0}
    a = {**one, "tokens_per_s": rate, "requests_per_s": {"mean": 1.0, "low": 1.0, "high": 1.0}}
    b = {**a, "tokens_per_s": {"mean": 108.0, "low": 100.0, "high": 120.0}}
    b["requests_per_s"] = {"mean": 2.0, "low": 1.9, "high": 2.1}
    setting = {"model": "demo (f)", "versions": "1", "load's machine": "a CPU, 2 cores, load 0.1 before, 0.2 after"}
    for name, figures, seed in (("a", a, 1), ("b", b, 2)):
        run = {"format": 1, "setting": setting, "plan": {"seed": seed}, "figures": [figures]}
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    assert main(["bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    said = capsys.readouterr().out
    assert "| tokens/s | 100 | 108 | 1.08 | within the spread of rounds |" in said
    assert "| requests/s | 1.00 | 2.00 | 2.00 |  |" in said and "| latency, p99 ms | 100 | 100 | 1.00 |  |" in said
    assert "differ in more than what they measured: seed." in said and "| failed | 0 of 10 | 0 of 10 | | |" in said
    assert "tokens/step" not in said


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocker())
from twotower.commands import main
sys.exit(main(["bench", "--url", "grpc://127.0.0.1:1"]))
"""


@pytest.mark.parametrize(
    ("blocked", "code", "words"),
    [
        (("torch", "ray", "numpy", "matplotlib", "cluster"), 1, "failed to connect"),
        (("twotower_client",), 2, "the package twotower-client, which is not installed"),
    ],
)
@pytest.mark.slow
def test_what_it_can_do_without(blocked: tuple[str, ...], code: int, words: str) -> None:
    program = BLOCKED.format(blocked=blocked)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code and words in done.stderr, done.stderr


def test_help_teaches_with_two_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert capsys.readouterr().out.count("    python -m twotower bench ") == 3


@pytest.mark.parametrize(
    ("flags", "most", "used"),
    [
        (["--clients", "1"], 1, 1),
        (["--clients", "12"], 8, 8),
        (["--rate", "1000"], 8, 8),
        (["--clients", "1,3", "--connections", "2"], 2, 2),
        (["--clients", "12", "--connections", "12"], 12, 12),
    ],
)
async def test_requests_go_over_several_connections(
    cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch, flags: list[str], most: int, used: int
) -> None:
    opened: list[Any] = []

    class Noted(AsyncClient):
        asked = 0

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            opened.append(self)

        def stream(self, *arguments: Any, **options: Any) -> Any:
            self.asked += 1
            return super().stream(*arguments, **options)

    monkeypatch.setattr(command, "AsyncClient", Noted)
    async with grpc_server(generation(cells)) as (address, _):
        load = ["--requests", "24", "--warm-up", "0", "--family", "words", "--max-new-tokens", "4"]
        assert await bench("--url", f"grpc://{address}", *load, *flags) == 0
    asked = [one.asked for one in opened]
    assert len(asked) == most and sum(one > 0 for one in asked) == used
    assert min(asked) >= 24 // most and len(cells.requests) == sum(asked)
