"""The quality benchmark against targets that are made up: what it asks, what it keeps, what it writes."""

import json
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as BpeTokenizer

from benchmarks.quality import _parser, main, write
from benchmarks.quality_parts.experiment import Experiment
from benchmarks.quality_parts.plan import Plan
from benchmarks.quality_parts.record import Record, Spent
from benchmarks.quality_parts.report import Costs, Findings, by_task, render
from benchmarks.quality_parts.targets import HttpPath, LocalPath, target_of
from benchmarks.reference.paths import Piece, ServedPath
from benchmarks.reference.workload import DEMO
from twotower.commands.journal import Journal
from twotower.core import Mode, Request
from twotower.demo.corpus import held_out
from twotower.demo.scores import AR, MOCK_AR, USUAL, Way
from twotower.demo.tokenizer import decode_answer, encode_answer, load_tokenizer
from twotower.errors import ConfigError

PLAN = Plan(
    (AR, MOCK_AR, USUAL, Way(Mode.DIFFUSION, 0.5)),
    per_family=4,
    concurrency=(1, 2),
    sample_per_family=2,
    rounds=2,
    families=("roman", "count"),
)
COSTS = Costs(0.004, 0.002, 0.003, 0.005, 12)


class Oracle:
    """Knows every answer; at γ 0.5 it gets every second one wrong. Two steps a block."""

    name = "oracle"

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self._tokenizer = load_tokenizer(DEMO)
        known = [i for family in PLAN.families for i in held_out(family, 8)]
        self._answers = {i.prompt: i.answer for i in known}

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Oracle"]:
        yield self

    async def generate(self, request: Request) -> AsyncIterator[Piece]:
        self.asked.append(request)
        params = request.params
        answer = self._answers[decode_answer(self._tokenizer, request.prompt_token_ids)]
        tokens = encode_answer(self._tokenizer, answer)
        if params.confidence_threshold == 0.5 and len(self.asked) % 2:
            tokens = tokens[1:]
        for start in range(0, len(tokens), 16 if params.mode is Mode.DIFFUSION else 1):
            block = tokens[start : start + 16] if params.mode is Mode.DIFFUSION else tokens[start : start + 1]
            yield Piece(tuple(block), 2 if params.mode is Mode.DIFFUSION else 0)


@pytest.fixture
def tokenizer() -> BpeTokenizer:
    return load_tokenizer(DEMO)


async def _findings(tokenizer: BpeTokenizer, path: Path, resume: bool = False) -> tuple[Findings, Oracle]:
    record, oracle = Record(Journal(path, PLAN.about(), resume)), Oracle()
    await Experiment(PLAN, oracle, tokenizer, record).run()
    record.close()
    return Findings(PLAN, record, COSTS), oracle


async def test_what_is_found_is_what_was_answered(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    findings, oracle = await _findings(tokenizer, tmp_path / "q.jsonl")
    assert findings.kept(USUAL) == 1.0
    assert findings.kept(Way(Mode.DIFFUSION, 0.5)) == 0.5
    assert len({request.id for request in oracle.asked}) == len(oracle.asked)
    assert {request.params.temperature for request in oracle.asked} == {0.0}
    assert [len(findings.record.of(str(AR), c)) for c in (1, 2)] == [2, 2]
    assert not findings.record.of(str(MOCK_AR), 1), "mock-AR has no speed that anybody wants to know"
    report = render(findings, "an oracle", 0.0, "the command")
    assert "| roman | 100.0 % | 100.0 % | 100.0 % |" in report
    assert [len(findings.record.of(str(USUAL), 1, long)) for long in (False, True)] == [2, 2]
    assert {r.params.max_new_tokens for r in oracle.asked if r.params.ignore_eos} == {128}
    assert "| diffusion 0.8 |" in report.partition("## Long answers")[2]
    assert "c = 2.00" in report and "## Steps per block" in report
    assert "| diffusion 0.5 | 50.0 % | 50.0 % (" in report
    per_step = findings.timed_tokens_per_step(USUAL)
    assert f"| {per_step:.2f} | {COSTS.ceiling(per_step):.2f} |" in report


async def test_whose_time_it_is(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    assert COSTS.passes_s(Spent(2, 40, 8, 1, 9.9)) == pytest.approx(2 * 0.005 + 8 * 0.004 + 0.003)
    assert COSTS.passes_s(Spent(2, 40, 0, 0, 9.9)) == pytest.approx(2 * 0.005 + 38 * 0.002)
    findings, _ = await _findings(tokenizer, tmp_path / "q.jsonl")
    [run, _] = findings.record.of(str(USUAL), 1)
    asked = PLAN.timed(1)
    assert set(run.tasks) == {"roman", "count"} and run.spent.num_answers == len(asked) == 8
    assert (run.spent.num_tokens, run.spent.num_steps) == (run.num_tokens, run.num_steps)
    blocks = sum(-(-len(encode_answer(tokenizer, instance.answer)) // 16) for instance in asked)
    assert run.spent.num_commits == blocks - 8 > 0 and 0 < run.spent.seconds <= run.seconds
    [row] = [line for line in by_task(findings).splitlines() if line.startswith("| count |")]
    mean = statistics.mean(len(encode_answer(tokenizer, i.answer)) for i in PLAN.sample() if i.family == "count")
    times = statistics.median(findings.task_times_ar(USUAL, "count"))
    assert row.endswith(f"| {mean:.0f} | {times:.2f} |")
    report = render(findings, "an oracle", 0.0, "the command").partition("## Where an answer's time goes")[2]
    passes = 1e3 * COSTS.passes_s(run.spent) / 8
    assert f"| {passes:.1f} |" in report and "a prompt (12 tokens, 5.00 ms)" in report
    without = Findings(PLAN, findings.record, None)
    assert "Where an answer's time goes" not in render(without, "an oracle", 0.0, "the command")


async def test_a_run_that_was_cut_short_goes_on(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    whole, _ = await _findings(tokenizer, path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])  # killed while it wrote the seventh score
    resumed, oracle = await _findings(tokenizer, path, resume=True)
    assert resumed.record.scores.keys() == whole.record.scores.keys()
    assert resumed.record.runs.keys() == whole.record.runs.keys()
    per_square = PLAN.per_family
    quality = [request for request in oracle.asked if "-q-" in request.id]
    assert len(quality) == per_square * 2  # of eight
    assert len(path.read_text().splitlines()) == len(lines)
    assert resumed.record.resumed and "more than one sitting" in render(resumed, "an oracle", 0.0, "the command")


def test_a_record_is_neither_erased_nor_gone_on_with_unasked(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    Journal(path, PLAN.about()).close()
    with pytest.raises(ConfigError, match="--resume goes on with it, --overwrite begins anew"):
        Journal(path, PLAN.about())
    other = replace(PLAN, per_family=200).about()
    with pytest.raises(ConfigError, match="instances per family was 4, now it is 200"):
        Journal(path, other, resume=True)
    more_rounds = replace(PLAN, rounds=7).about()
    Journal(path, more_rounds, resume=True).close()
    Journal(path, other, overwrite=True).close()
    Journal(path, other, resume=True).close()
    path.write_text("score {}\n")
    with pytest.raises(ConfigError, match="it does not say what it is about"):
        Journal(path, other, resume=True)
    path.write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match=r"q\.jsonl: "):
        Journal(path, other, resume=True)


async def test_four_files_are_written(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    findings, _ = await _findings(tokenizer, tmp_path / "q.jsonl")
    write(tmp_path / "quality_2.5", "an oracle", findings, 0.0, "the command")
    names = {path.name for path in tmp_path.iterdir()} - {"q.jsonl"}
    assert names == {f"quality_2.5{ending}" for ending in (".md", ".json", "_trade.png", "_steps.png")}
    figures = json.loads((tmp_path / "quality_2.5.json").read_text())
    roman = figures["families"]["roman"]
    assert roman["ar"] == {"accuracy": 1.0, "tokens_per_step": 1.0}
    assert roman["diffusion 0.8"]["blocks"] == [{"mean_steps": 2.0, "num_blocks": 4}]
    assert figures["costs"]["c"] == 2.0
    assert "![trade](quality_2.5_trade.png)" in (tmp_path / "quality_2.5.md").read_text()


def test_targets() -> None:
    assert isinstance(target_of("local", DEMO), LocalPath)
    assert isinstance(target_of("grpc://127.0.0.1:1", DEMO), ServedPath)
    assert isinstance(target_of("http://127.0.0.1:1", DEMO), HttpPath)
    with pytest.raises(ConfigError, match="got 'ftp://x'"):
        target_of("ftp://x", DEMO)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--target", "127.0.0.1:1"], 2, "wanted local, grpc"),
        (["--checkpoint", "/nowhere"], 2, "no such directory"),
        (["--target", "grpc://127.0.0.1:9", "--quick"], 1, "no service answers on 127.0.0.1:9"),
        (["--target", "http://127.0.0.1:9", "--quick"], 1, "refused"),
        (["--num-instances", "600"], 2, "test instances, found only"),
    ],
)
def test_what_goes_wrong_is_one_line(
    arguments: list[str], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "q")]) == status
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in last and last.startswith("quality: ")


def test_speed_is_measured_at_concurrency_1_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert _parser().parse_args(["--concurrency", "64,16"]).concurrency == (1, 16, 64)
    with pytest.raises(SystemExit):
        _parser().parse_args(["--concurrency", "4,0"])
    assert "--concurrency: got '0', wanted a whole number from 1" in capsys.readouterr().err
