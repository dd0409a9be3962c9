"""The quality benchmark against targets that are made up: what it asks, what it keeps, what it writes."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer as BpeTokenizer

from benchmarks.quality import _parser, main, write
from benchmarks.quality_parts.experiment import Experiment
from benchmarks.quality_parts.plan import Plan
from benchmarks.quality_parts.record import Record, Run, Spent
from benchmarks.quality_parts.report import Costs, Findings, by_task, render
from benchmarks.quality_parts.targets import LocalPath, target_of
from benchmarks.reference.paths import Piece, ServedPath
from benchmarks.reference.workload import DEMO
from twotower.commands.journal import Journal
from twotower.core import Mode, Request
from twotower.demo.corpus import held_out
from twotower.demo.scores import AR, MOCK_AR, USUAL, VERIFIED, Way, identical
from twotower.demo.tokenizer import decode_answer, encode_answer, load_tokenizer
from twotower.errors import ConfigError

PLAN = Plan(
    (AR, MOCK_AR, USUAL, VERIFIED, Way(Mode.DIFFUSION, 0.5)),
    per_family=4,
    concurrency=(1, 2),
    sample_per_family=2,
    rounds=2,
    families=("roman", "count", "steps"),
)
SHORT = ("roman", "count")
COSTS = Costs(0.004, 0.002, 0.003, 0.005)


class Oracle:
    """Knows every answer; at γ 0.5 it gets every second one wrong. Two steps a block, eight tokens a round."""

    name = "oracle"

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self._tokenizer = load_tokenizer(DEMO)
        self._answers = _answers()

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
        width = {Mode.DIFFUSION: 16, Mode.VERIFIED: 8}.get(params.mode, 1)
        for start in range(0, len(tokens), width):
            yield Piece(tuple(tokens[start : start + width]), 0 if width == 1 else 2, 1)


@cache
def _answers() -> dict[str, str]:
    """By prompt. To draw them takes half a second."""
    return {i.prompt: i.answer for family in PLAN.families for i in held_out(family, 8)}


@pytest.fixture
def tokenizer() -> BpeTokenizer:
    return load_tokenizer(DEMO)


async def _findings(tokenizer: BpeTokenizer, path: Path, resume: bool = False) -> tuple[Findings, Oracle]:
    record, oracle = Record(Journal(path, PLAN.about(), resume)), Oracle()
    await Experiment(PLAN, oracle, tokenizer, record).run()
    record.close()
    return Findings(PLAN, record, COSTS), oracle


@pytest.mark.slow
async def test_what_is_found_is_what_was_answered(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    findings, oracle = await _findings(tokenizer, tmp_path / "q.jsonl")
    assert findings.kept(USUAL) == 1.0
    careless = Way(Mode.DIFFUSION, 0.5)
    assert findings.kept(careless, long=False) == 0.5
    assert len({request.id for request in oracle.asked}) == len(oracle.asked)
    assert {request.params.temperature for request in oracle.asked} == {0.0}
    assert [len(findings.record.of(str(AR), c, long)) for c in (1, 2) for long in (False, True)] == [2, 2, 2, 2]
    assert not findings.record.of(str(MOCK_AR), 1), "mock-AR has no speed that anybody wants to know"
    report = render(findings, "an oracle", 0.0, "the command")
    assert re.search(r"\| roman \| \d+ \| 100.0 % \| 100.0 % \| 100.0 % \|", report)
    assert identical(findings.scores(VERIFIED), findings.scores(AR)) == 1.0
    assert identical(findings.scores(careless, False), findings.scores(AR, False)) == 0.5
    assert "| long | verified | 100.0 % | 100.0 % | 7." in report.partition("## By task")[0]
    assert "c = 2.00" in report and "## Steps per block" in report
    kept = 100 * findings.kept(careless)
    assert f"| diffusion 0.5 | {kept:.1f} % | {kept:.1f} % (" in report
    for long in (False, True):
        per_step = findings.timed_tokens_per_step(USUAL, long)
        assert f"| {per_step:.2f} | {COSTS.ceiling(per_step):.2f} |" in report


async def test_what_each_task_took(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    findings, _ = await _findings(tokenizer, tmp_path / "q.jsonl")
    for long, families in ((False, {*SHORT}), (True, {"steps"})):
        asked = PLAN.timed(1, long)
        lengths = [len(encode_answer(tokenizer, instance.answer)) for instance in asked]
        blocks = sum(-(-length // 16) for length in lengths)
        rounds = sum(-(-length // 8) for length in lengths)
        for way, commits in ((AR, 0), (USUAL, blocks - 8), (VERIFIED, rounds)):
            [run, _] = findings.record.of(str(way), 1, long)
            assert set(run.tasks) == families and run.spent.num_answers == len(asked) == 8
            assert (run.spent.num_tokens, run.spent.num_steps) == (run.num_tokens, run.num_steps) and run.num_tokens
            assert run.spent.num_commits == commits and 0 < run.spent.seconds <= run.seconds
        assert blocks > (40 if long else 8)
    assert not findings.record.of(str(AR), 2)[0].tasks, "requests that overlap have no time of their own"
    again = Record(Journal(tmp_path / "q.jsonl", PLAN.about(), resume=True))
    again.close()
    assert again.runs == findings.record.runs


@pytest.mark.slow
async def test_whose_time_it_is(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    """Eight answers of 13 tokens: `ar` takes 40 ms each, diffusion, in 3 steps and half a commit, 20 ms."""
    findings, _ = await _findings(tokenizer, tmp_path / "q.jsonl")
    for way, spent in ((AR, Spent(4, 52, 0, 0, 0.16)), (USUAL, Spent(4, 52, 12, 2, 0.08))):
        for number in (0, 1):
            tasks = {"roman": spent, "count": replace(spent, seconds=spent.seconds * (1 + number))}
            seconds = sum(each.seconds for each in tasks.values())
            run = Run(str(way), 1, number, seconds, 104, 2 * spent.num_steps, 0.01, tasks=tasks)
            findings.record._keep_run(run)
    bare_ar, bare_usual = 5 + 12 * 2, 5 + 3 * 4 + 0.5 * 3
    assert 250 * COSTS.passes_s(Spent(4, 52, 0, 0, 9.9)) == pytest.approx(bare_ar)
    assert 250 * COSTS.passes_s(Spent(4, 52, 12, 2, 9.9)) == pytest.approx(bare_usual)
    rows = render(findings, "an oracle", 0.0, "the command").partition("## Where an answer's time goes")[2]
    assert "| short | ar | 50.0 (40.0–60.0) | 29.0 | 21.0 | 1.00 | 1.00 | 100.0 % |" in rows
    ratio = bare_ar / bare_usual
    wanted = f"| short | {USUAL} | 25.0 (20.0–30.0) | 18.5 | 6.5 | 2.00 | {ratio:.2f} | {200 / ratio:.1f} % |"
    assert wanted in rows and "a prompt (5.00 ms on average)" in rows
    assert "| count | 13 | 100.0 % | 100.0 % | 100.0 % | " in by_task(findings)
    assert by_task(findings).count("| 2.00 (2.00–2.00) | 100.0 % |") == 3  # both tasks, and the two together
    without = Findings(PLAN, findings.record, None)
    assert "Where an answer's time goes" not in render(without, "an oracle", 0.0, "the command")


@pytest.mark.slow
async def test_a_run_that_was_cut_short_goes_on(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    whole, _ = await _findings(tokenizer, path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])  # killed while it wrote the seventh score
    resumed, oracle = await _findings(tokenizer, path, resume=True)
    assert resumed.record.scores.keys() == whole.record.scores.keys()
    assert resumed.record.runs.keys() == whole.record.runs.keys()
    quality = [request for request in oracle.asked if "-q-" in request.id]
    assert len(quality) == 4 * PLAN.per_family + 5  # four squares of short answers were open, and all of long ones
    assert len(path.read_text().splitlines()) == len(lines)
    assert resumed.record.resumed and "several runs" in render(resumed, "an oracle", 0.0, "the command")


def test_a_record_goes_on_with_the_same_questions_only(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    journal = Journal(path, PLAN.about())
    journal.add("run", "{}")
    journal.close()
    with pytest.raises(ConfigError, match="instances per family was 4, now it is 200"):
        Journal(path, replace(PLAN, per_family=200).about(), resume=True)
    with pytest.raises(ConfigError, match="form of the record was 1, now it is 3"):
        path.write_text(path.read_text().replace('"form of the record": 3', '"form of the record": 1'))
        Journal(path, PLAN.about(), resume=True)


def test_a_record_may_get_more_rounds(tmp_path: Path) -> None:
    assert replace(PLAN, rounds=7).about() == PLAN.about()


@pytest.mark.slow
async def test_four_files_are_written(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    findings, _ = await _findings(tokenizer, tmp_path / "q.jsonl")
    write(tmp_path / "quality_2.5", "an oracle", findings, 0.0, "the command")
    names = {path.name for path in tmp_path.iterdir()} - {"q.jsonl"}
    assert names == {f"quality_2.5{ending}" for ending in (".md", ".json", "_trade.png", "_steps.png")}
    figures = json.loads((tmp_path / "quality_2.5.json").read_text())
    roman = figures["families"]["roman"]
    assert roman["ar"] == {"accuracy": 1.0, "tokens_per_step": 1.0}
    assert figures["prompts"] == 9 and figures["quality"][3]["identical"] == 1.0
    assert roman["diffusion 0.8"]["blocks"] == [{"mean_steps": 2.0, "num_blocks": 4}]
    assert figures["costs"]["c"] == 2.0
    assert "![trade](quality_2.5_trade.png)" in (tmp_path / "quality_2.5.md").read_text()


def test_targets() -> None:
    assert isinstance(target_of("local", DEMO), LocalPath)
    assert isinstance(target_of("grpc://127.0.0.1:1", DEMO), ServedPath)
    assert isinstance(target_of("http://127.0.0.1:1", DEMO), ServedPath)
    with pytest.raises(ConfigError, match="got 'ftp://x'"):
        target_of("ftp://x", DEMO)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--target", "127.0.0.1:1"], 2, "wanted local, grpc"),
        (["--checkpoint", "/nowhere"], 2, "no such directory"),
        (["--target", "grpc://127.0.0.1:9", "--quick"], 1, "127.0.0.1:9"),
        (["--target", "http://127.0.0.1:9", "--quick"], 1, "127.0.0.1:9"),
        (["--num-instances", "600"], 2, "test instances, found only"),
    ],
)
@pytest.mark.slow
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
