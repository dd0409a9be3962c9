"""`generate --logprobs` and `--trace`: what they show on a terminal and elsewhere, and the numbers as JSON."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.cluster.fakes import ByteTokenizer, tokens
from tests.commands.running import IDS_ONLY, RESULT, Run, json_lines, results_of
from twotower.commands.told import Piece
from twotower.commands.views import DetailView, view_of
from twotower.core import Likelihood, Mode, RequestId, RoundEvent, StepEvent
from twotower.text.token_texts import TokenTexts

ID = RequestId("r")
ONE = [
    "--checkpoint",
    IDS_ONLY,
    "--prompt-token-ids",
    "5,9,11",
    "--max-new-tokens",
    "20",
    "--ignore-eos",
    "--seed",
    "1",
]


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.VERIFIED, Mode.AR])
@pytest.mark.slow
def test_the_numbers_as_json(mode: Mode, run: Callable[..., Run]) -> None:
    common = [*ONE, "--mode", mode, "--json"]
    plain, told = run(*common).result, run(*common, "--logprobs", "2").result
    assert told["token_ids"] == plain["token_ids"] and list(told) == [*RESULT, "logprobs"]
    assert [one["token_id"] for one in told["logprobs"]] == plain["token_ids"]
    for one in told["logprobs"]:
        assert one["token"] == f"token_id:{one['token_id']}"
        first, second = one["top"]
        assert 0 >= first["log_prob"] >= second["log_prob"] and one["log_prob"] <= first["log_prob"]
        assert ("confidence" in one) == (mode is Mode.DIFFUSION)
        if mode is not Mode.DIFFUSION:
            assert first["token_id"] == one["token_id"] and first["log_prob"] == one["log_prob"]


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.VERIFIED, Mode.AUTO])
def test_the_trace_as_json(mode: Mode, run: Callable[..., Run]) -> None:
    result = run(*ONE, "--mode", mode, "--json", "--trace").result
    steps = [told["step"] for told in result["trace"] if "step" in told]
    assert list(result) == [*RESULT, "trace"] and steps
    assert all(len(step["positions"]) == len(step["token_ids"]) == len(step["confidence"]) for step in steps)
    if mode is Mode.DIFFUSION:
        assert len(steps) == result["num_steps"] and {step["start"] for step in steps} == {0, 16}
        filled = {
            place: token for step in steps for place, token in zip(step["positions"], step["token_ids"], strict=True)
        }
        assert [filled[place] for place in range(20)] == result["token_ids"]
    else:
        rounds = [told["round"] for told in result["trace"] if "round" in told]
        assert sum(one["num_accepted"] for one in rounds) == result["num_accepted"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mode", "ar", "--trace"], "trace: got True, but trace is not supported in ar mode"),
        (["--mode", "mock_ar", "--trace"], "trace: got True, but trace is not supported in mock_ar mode"),
        (["--logprobs", "21"], "logprobs: got 21, wanted an integer from 0 to 20"),
        (["--logprobs=-1"], "logprobs: got -1, wanted an integer from 0 to 20"),
        (["--logprobs", "some"], "logprobs: got 'some', wanted an integer from 0 to 20"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(flags: list[str], words: str, run: Callable[..., Run]) -> None:
    done = run("--checkpoint", IDS_ONLY, "--prompt-token-ids", "5", *flags)
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1 and done.out == ""


def test_a_file_of_prompts_asks_by_line_or_by_flag(tmp_path: Path, run: Callable[..., Run]) -> None:
    ids = {"prompt_token_ids": [5], "max_new_tokens": 4}
    lines = [ids, ids | {"logprobs": 0, "trace": False}, ids | {"mode": "ar", "trace": False}, ids | {"mode": "ar"}]
    file, out = json_lines(tmp_path / "in", *lines), tmp_path / "out"
    done = run("--checkpoint", IDS_ONLY, "--input", file, "--output", str(out), "--logprobs", "1", "--trace")
    assert done.code == 1 and f"{file}:4: trace: got True, but trace is not supported in ar mode" in done.err
    first, second, third = results_of(out)
    assert [one.keys() & {"logprobs", "trace"} for one in (first, second, third)] == [
        {"logprobs", "trace"},
        {"logprobs"},
        {"logprobs"},
    ]
    assert len(first["logprobs"][0]["top"]) == 1 and second["logprobs"][0]["top"] == []
    refused = run("--checkpoint", IDS_ONLY, "--input", file, "--output", str(out), "--logprobs", "21")
    assert refused.code == 2 and refused.err.count("\n") == 1 and "logprobs: got 21" in refused.err


def step(start: int, number: int, positions: Sequence[int], text: str) -> StepEvent:
    return StepEvent(ID, start, 4, number, tuple(positions), tokens(text), (0.75,) * len(positions))


def shown(view: DetailView, *told: Piece | StepEvent | RoundEvent) -> None:
    for one in told:
        view.hear(one)
    view.end()


TEXTS = TokenTexts(ByteTokenizer())
DIFFUSION = (step(0, 0, [0, 2], "ab"), step(0, 1, [1, 3], "\x1b\n"), Piece("a\x1bb\n", tokens("a\x1bb\n")))


def test_a_block_fills_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What a terminal would obey is written out; new text is marked."""
    shown(DetailView(TEXTS, colour=False), *DIFFUSION)
    assert capsys.readouterr().out.splitlines() == [
        "block at 0, 4 positions",
        "  step 0, 2 fixed, p ≥ 0.75   {+a+}░{+b+}░",
        r"  step 1, 2 fixed, p ≥ 0.75   a{+\x1b+}b{+\n+}",
        r"  committed, 4 tokens         a\x1bb\n",
        "",
        "a\x1bb",
        "",
    ]


def test_on_a_terminal_new_text_has_a_colour(capsys: pytest.CaptureFixture[str]) -> None:
    shown(DetailView(TEXTS, colour=True), *DIFFUSION)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("\033[1;32ma\033[0m\033[2m░\033[0m\033[1;32mb\033[0m\033[2m░\033[0m")
    assert "{+" not in "".join(lines)


def test_a_round_tells_what_stands(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = RoundEvent(ID, 1, tokens("bxy"), 1, tokens("c")[0])
    alone = RoundEvent(ID, 3, (), 0, 2)
    shown(DetailView(TEXTS, colour=False), step(1, 0, [1, 2, 3], "bxy"), verdict, Piece("bc", tokens("bc")), alone)
    assert capsys.readouterr().out.splitlines()[2:6] == [
        "  1 of 3 drafted stand        b[-xy-]{+c+}",
        "  committed, 2 tokens         bc",
        "block at 3",
        "  no draft                    {+‹2›+}",
    ]


def test_a_block_that_is_begun_again_begins_masked(capsys: pytest.CaptureFixture[str]) -> None:
    shown(DetailView(TEXTS, colour=False), step(0, 0, [0, 1], "ab"), step(0, 0, [3], "d"))
    assert capsys.readouterr().out.splitlines()[2:4] == [
        "block at 0, 4 positions",
        "  step 0, 1 fixed, p ≥ 0.75   ░░░{+d+}",
    ]


def test_likelihoods_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    sure = Likelihood(0.0, (tokens("a")[0], 2), (0.0, -9.5), 0.5)
    shown(DetailView(TEXTS, colour=False), Piece("a", tokens("a"), [sure]), Piece("", [2], [Likelihood(-2.0)]))
    assert capsys.readouterr().out.splitlines() == [
        "  log-prob        p  denoiser  token                       likeliest",
        "    0.0000   100.0%     50.0%  'a'                         'a' 0.0000  ‹2› -9.5000",
        "   -2.0000    13.5%         –  ‹2›",
        "",
        "a",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_colour_is_for_terminals_alone(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    view = view_of(True, False, TEXTS)
    assert isinstance(view, DetailView) and view._colour is terminal
    monkeypatch.setenv("NO_COLOR", "1")
    assert view_of(True, False, TEXTS)._colour is False  # type: ignore[union-attr]
