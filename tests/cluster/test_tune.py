"""`python -m cluster tune` against scripted cells: what it asks, what it makes of the answers, what it refuses."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from cluster.cli.asking import Refused
from cluster.cli.main import main
from cluster.cli.tune import sweep
from cluster.cli.tune.questions import Question, read_questions
from cluster.cli.tune.recommendation import Lossless, Rated, advise, compare, rate
from cluster.cli.tune.report import Findings
from cluster.cli.tune.sweep import AR, VERIFIED, Answered, Pass, Way
from tests.cluster.fakes import ScriptedCells, generation, grpc_server, tokens
from twotower.core import BlockEvent, FinishReason, Mode, Request
from twotower.errors import InvalidRequest, Overloaded, TwoTowerError
from twotower_client import RetryPolicy

ANSWER = "forty-two"
GAMMA = Way(Mode.DIFFUSION, 0.8)


class GammaCells(ScriptedCells):
    """Like `ar` from γ 0.7 on; below it, every second prompt gets another answer. Fewer steps with a lower γ.

    `unlike`: `verified` is not what it is to be.
    """

    broken_at: float | None = None
    unlike = False

    async def generate(self, request: Request, timeout_s: float) -> AsyncGenerator[BlockEvent, None]:
        self.requests.append(request)
        params = request.params
        if params.mode is Mode.DIFFUSION and params.confidence_threshold == self.broken_at:
            raise TwoTowerError("the cell failed")
        ar = params.mode is Mode.AR
        if params.mode is Mode.VERIFIED:
            ids = tokens(ANSWER[::-1] if self.unlike else ANSWER)
            yield BlockEvent(request.id, 0, ids, 3, 2, FinishReason.STOP)
            return
        wrong = not ar and params.confidence_threshold < 0.7 and request.prompt_token_ids[-1] % 2 == 0
        await asyncio.sleep(0.02 if ar else 0.01 * params.confidence_threshold)
        ids = tokens("wrong" if wrong else ANSWER)
        steps = 0 if ar else round(10 * params.confidence_threshold)
        yield BlockEvent(request.id, 0, ids, steps, 1, FinishReason.STOP)


@pytest.fixture
def cells() -> GammaCells:
    return GammaCells()


@pytest.fixture
def address(cells: GammaCells) -> Iterator[str]:
    """A gRPC server on a thread with a loop of its own: the command under test has one itself."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    found: list[str] = []
    done = asyncio.Event()

    async def serve() -> None:
        async with grpc_server(generation(cells)) as (where, _):
            found.append(where)
            ready.set()
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    yield found[0]
    loop.call_soon_threadsafe(done.set)
    thread.join(10)
    loop.close()


def _lines(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return _lines(tmp_path / "prompts.jsonl", *({"prompt": f"what is {number}"} for number in range(8)))


def test_the_fastest_threshold_that_agrees_with_ar(
    address: str, cells: GammaCells, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(prompts), "--confidence-thresholds", "0.5,0.7,1", "--concurrency", "2"]
    assert main(["tune", "--address", address, *arguments]) == 0
    said = capsys.readouterr().out
    assert "8 prompts, temperature 0; quality: answers that are ar's, token for token; floor 98.0 %" in said
    assert "> γ 0.7" in said and "take γ 0.7." in said.lower() and "decode.confidence_threshold=0.7" in said
    assert f"on {address}, 2 at once" in said
    # Eight of eight may be luck: 0.98 ** 183 is 2.5 %.
    assert (
        "Not certain: the interval begins at 63.1 %, below the floor; about 175 more prompts would settle it." in said
    )
    asked = [(request.params.mode, request.params.confidence_threshold) for request in cells.requests]
    modes = [mode for mode, _ in asked]
    assert modes.count(Mode.AR) == modes.count(Mode.VERIFIED) == 8 + 2
    assert "verified 100.0 %" in " ".join(said.split()) and "all answers are ar's own" in said
    assert {request.params.temperature for request in cells.requests} == {0.0}


def test_json_and_files(address: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", str(prompts), "--confidence-thresholds", "0.5", "--output", str(tmp_path / "t"), "--json"]
    assert main(["tune", "--address", address, *arguments]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["recommendation"] is None and figures["quality"] == "agreement"
    assert [way["threshold"] for way in figures["ways"]] == [None, 0.5]
    assert figures["ways"][1]["quality"] == 0.5
    assert figures["verified"]["quality"] == 1.0 and figures["verified"]["same_as_ar"] is True
    assert json.loads((tmp_path / "t.json").read_text()) == figures
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_sweep_that_was_cut_short_goes_on(
    address: str, cells: GammaCells, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune", "--address", address, "--input", str(prompts), "--output", str(tmp_path / "t")]
    arguments += ["--confidence-thresholds", "0.5,0.7,1"]
    cells.broken_at = 0.7
    assert main(arguments) == 1
    assert "2 passes are kept; --resume continues from there" in capsys.readouterr().err
    cells.broken_at = None
    cells.requests.clear()
    assert main(arguments) == 2
    assert "t.part: holds an earlier run; --resume continues it" in capsys.readouterr().err
    assert main([*arguments, "--concurrency", "3", "--resume"]) == 2
    assert "cannot be resumed: prompts at once was 16, now it is 3" in capsys.readouterr().err
    assert not cells.requests
    assert main([*arguments, "--resume"]) == 0
    asked = {(request.params.mode, request.params.confidence_threshold) for request in cells.requests}
    assert asked == {(Mode.DIFFUSION, 0.7), (Mode.DIFFUSION, 1.0), (Mode.VERIFIED, 0.8)}
    said = capsys.readouterr().out
    assert "take γ 0.7." in said.lower() and "in several runs" in said
    assert json.loads((tmp_path / "t.json").read_text())["resumed"] is True
    assert not (tmp_path / "t.part").exists(), "all of it is in the other files now"
    assert main(arguments) == 0, "and nothing is in the way of the next run"
    assert main(["tune", "--address", address, "--input", str(prompts), "--resume"]) == 2
    assert "wanted --output PREFIX too" in capsys.readouterr().err


def test_with_answers_of_his_own(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = [{"prompt": f"what is {n}", "answer": ANSWER if n < 6 else "no"} for n in range(8)]
    prompts = _lines(tmp_path / "p.jsonl", *values)
    assert main(["tune", "--address", address, "--input", str(prompts), "--confidence-thresholds", "0.5,0.9"]) == 0
    said = capsys.readouterr().out
    assert "exact answers, as a share of ar's" in said and "take γ 0.9." in said.lower()
    assert "ar answers 75.0 % of them right" in said


def test_nothing_is_advised_where_ar_gets_nothing_right(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = _lines(tmp_path / "p.jsonl", *({"prompt": f"what is {n}", "answer": "42"} for n in range(4)))
    assert main(["tune", "--address", address, "--input", str(prompts), "--confidence-thresholds", "0.5"]) == 1
    told = capsys.readouterr()
    assert "ar gets none of the answers right; line 1: got 'forty-two', wanted '42'" in told.err
    assert "Take" not in told.out


async def test_a_service_that_is_full_for_a_while_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class FullForAWhile(GammaCells):
        calls = 0

        async def generate(self, request: Request, timeout_s: float) -> AsyncGenerator[BlockEvent, None]:
            self.calls += 1
            if self.calls in (2, 3):  # right behind the warm-up
                raise Overloaded("every cell is full", 0.0)
            async for event in super().generate(request, timeout_s):
                yield event

    monkeypatch.setattr(sweep, "RETRIES", RetryPolicy(attempts=5, first_s=0.0))
    async with grpc_server(generation(FullForAWhile())) as (where, _):
        passes = await sweep.Sweep(where, [Question(1, "a")], [AR, GAMMA], 1, None, 10.0).run(
            {}, lambda: None, lambda _: None
        )
    assert [one.answers[0].token_ids for one in passes] == [tokens(ANSWER)] * 2
    assert [one.asked_again for one in passes] == [2, 0]


async def test_one_that_stays_full_is_named_without_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(GammaCells):
        async def generate(self, request: Request, timeout_s: float) -> AsyncGenerator[BlockEvent, None]:
            raise Overloaded("every cell is full", 0.0)
            yield

    monkeypatch.setattr(sweep, "RETRIES", RetryPolicy(attempts=2, first_s=0.0))
    async with grpc_server(generation(Full())) as (where, _):
        with pytest.raises(Refused, match="every cell is full") as caught:
            await sweep.Sweep(where, [Question(1, "a")], [AR, GAMMA], 1, None, 10.0).run(
                {}, lambda: None, lambda _: None
            )
    assert not caught.value.mistake and "line" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "got no prompt at all"),
        ('{"prompt": "a"', "line 1: got broken JSON"),
        ('{"prompt": "a"}\n[1]', "line 2: got an array, wanted a JSON object"),
        ('{"prompt": "a", "prompt": "b"}', "line 1: got broken JSON: 'prompt' is there twice"),
        ('{"prompt": null}', "line 1: got neither"),
        ('{"prompt": "a", "promt": 1}', "line 1: got the field 'promt'"),
        ('{"prompt": ""}', "line 1: got an empty prompt"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "line 1: got both"),
        ('{"prompt_token_ids": [1, true]}', "line 1: prompt_token_ids: got [1, True]"),
        ('{"prompt": "a", "answer": 5}', "line 1: answer: got 5, wanted a string"),
        ('{"prompt": "a", "answer": "b"}\n\n{"prompt": "c"}', "line 3: got no answer, but other lines have one"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_sent(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    assert main(["tune", "--address", "127.0.0.1:9", "--input", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--timeout", "nan"], "--timeout: got 'nan', wanted seconds, above 0"),
        (["--address", "nonsense"], "--address: got 'nonsense', wanted HOST:PORT"),
        (["--quality-floor", "0_1"], "--quality-floor: got '0_1', wanted a number from 0 to 1"),
        (["--confidence-thresholds", "0.5,nan"], "--confidence-thresholds: got 'nan', wanted a number from 0 to 1"),
    ],
)
def test_a_bad_flag_is_one_line(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["tune", "--input", "p.jsonl", *flags])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and error.count("\n") == 1


def test_answers_of_another_file_are_matched_by_id(tmp_path: Path) -> None:
    prompts = _lines(tmp_path / "p", {"id": 1, "prompt": "a"}, {"id": "x", "prompt": "b"})
    answers = _lines(tmp_path / "a", {"id": "x", "answer": "B"}, {"id": 1, "answer": "A"})
    assert read_questions(prompts, answers) == [Question(1, "a", "A"), Question(2, "b", "B")]
    with pytest.raises(InvalidRequest, match="line 2: got no answer for id 'x'"):
        read_questions(prompts, _lines(tmp_path / "b", {"id": 1, "answer": "A"}))


def test_nobody_there(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--address", "127.0.0.1:9", "--input", str(prompts)]) == 1
    assert "no service answers on 127.0.0.1:9" in capsys.readouterr().err


def test_a_refused_prompt_is_named(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = _lines(tmp_path / "p", {"prompt": "a"}, {"prompt": "b" * 100_000})
    assert main(["tune", "--address", address, "--input", str(prompts)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "line 2: prompt: got 100000 bytes of text, wanted at most 256" in error


def _rated(threshold: float | None, quality: float, low: float, speed: float, per_step: float = 2.0) -> Rated:
    return Rated(threshold, None, quality, low, 1.0, quality, speed, speed / 100, per_step)


def test_advice() -> None:
    ar = _rated(None, 1.0, 1.0, 100, 1.0)
    good, fast = _rated(0.9, 1.0, 0.99, 250, 1.5), _rated(0.8, 0.985, 0.965, 200, 2.0)
    loose = _rated(0.5, 0.9, 0.8, 300, 3.0)
    assert advise([ar, loose, fast, good], 0.98, 100).threshold == 0.8
    assert advise([ar, loose, fast, good], 0.98, 100).more_prompts == 1500  # 16 times as many: a quarter of the width
    assert advise([ar, loose, good], 0.98, 100).more_prompts == 0
    assert advise([ar, loose], 0.98, 100).threshold is None
    slow = _rated(1.0, 1.0, 1.0, 50)
    assert advise([ar, slow], 0.98, 100).slower_than_ar
    assert not advise([ar, slow, _rated(0.9, 1.0, 1.0, 150, 1.5)], 0.98, 100).slower_than_ar
    even = _rated(0.85, 0.99, 0.99, 195, 1.99)
    assert advise([ar, fast, even], 0.98, 100).threshold == 0.85, "as many tokens per step: the more careful one"


def test_rating_is_relative_to_ar() -> None:
    questions = [Question(n, "p", "yes") for n in range(4)]
    right, wrong = Answered("yes", (1, 2), 1), Answered("no", (1, 3), 1)
    ar = Pass(AR, (right, right, wrong, wrong), 2.0)
    ours = Pass(GAMMA, (right, wrong, wrong, wrong), 1.0)
    first, second = rate(questions, [ar, ours])
    assert (first.quality, first.times_ar, first.tokens_per_step) == (1.0, 1.0, 1.0)
    assert (second.quality, second.times_ar, second.tokens_per_step) == (0.5, 2.0, 2.0)
    assert second.agreement == (1 + 0.5 + 1 + 1) / 4
    assert second.low <= 0.5 <= second.high


def test_verified_is_compared_with_what_would_be_taken_without_it() -> None:
    """By tokens per second: its steps are not all its passes."""
    ar, good, loose = _rated(None, 1.0, 1.0, 100, 1.0), _rated(0.8, 0.99, 0.98, 200), _rated(0.5, 0.9, 0.8, 300, 3.0)
    fast, slow, slowest = (_rated(None, 1.0, 1.0, speed) for speed in (200, 150, 90))
    rated = [ar, loose, good]
    advice = advise(rated, 0.98, 100)
    assert compare(fast, rated, advice) == Lossless(Mode.VERIFIED, True, 1.0)
    assert compare(slow, rated, advice) == Lossless(Mode.DIFFUSION, True, 0.75)
    none = advise([ar, loose], 0.98, 100)
    assert compare(slow, [ar, loose], none) == Lossless(Mode.VERIFIED, True, 1.5)
    assert compare(slowest, [ar, loose], none) == Lossless(Mode.AR, True, 0.9)
    late = [ar, _rated(1.0, 1.0, 1.0, 50)]
    assert compare(slow, late, advise(late, 0.98, 100)) == Lossless(Mode.VERIFIED, True, 1.5), "not with a γ below ar"
    other = _rated(None, 0.99, 0.98, 400)
    assert compare(other, rated, advice) == Lossless(Mode.DIFFUSION, False, 2.0), "not lossless, so no choice"


def _found(verified_s: float, verified: Answered, gamma: Answered) -> str:
    questions, right = [Question(n, "p") for n in range(2)], Answered("yes", (1, 2), 2)
    passes = [Pass(AR, (right,) * 2, 2.0), Pass(GAMMA, (gamma,) * 2, 1.0), Pass(VERIFIED, (verified,) * 2, verified_s)]
    return Findings.of(questions, passes, 0.98).text()


def test_the_words_say_what_lossless_costs() -> None:
    right, wrong = Answered("yes", (1, 2), 2), Answered("no", (1, 3), 2)
    wins, costs = _found(0.8, right, right), _found(1.25, right, right)
    assert (
        "> verified" in wins
        and "Take verified: all answers are ar's own, at 1.25 × the tokens per second of γ 0.8." in wins
    )
    assert "for all: decode.mode=verified" in wins and "Of diffusion, take γ 0.8." in wins
    assert "That costs: 0.80 × the tokens per second of γ 0.8." in costs and "Take γ 0.8." in costs
    assert "> verified" not in costs
    alone = _found(1.25, right, wrong)
    assert "No γ keeps 98.0 %" in alone and "Take ar" not in alone and "1.60 × the tokens per second of ar" in alone
    assert "only 50.0 % of the tokens agree: near-ties, or a fault" in _found(0.8, wrong, right)
