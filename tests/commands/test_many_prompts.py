"""`generate` with a file of prompts: what it writes, in which order, and what is left of a run that breaks."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.running import IDS_ONLY, RESULT, Run, fake_pair, json_lines, results_of
from twotower.core import Request
from twotower.errors import NumericalError, TwoTowerError, Unavailable


@pytest.mark.slow
def test_a_file_of_prompts(with_text: str, tmp_path: Path, run: Callable[..., Run]) -> None:
    lines = [
        {"id": "first", "prompt": "the quick", "max_new_tokens": 40, "seed": 1},
        {"prompt_token_ids": [5, 6], "mode": "ar", "max_new_tokens": 3, "top_k": 4, "temperature": 0.5, "seed": 2},
        {"id": 7, "prompt": "dog", "mode": "mock_ar", "max_new_tokens": 9, "stop": ["x", "y"], "stop_token_ids": [9]},
        {"id": "日本", "prompt": "fox", "block_size": 4, "steps_per_block": 2, "confidence_threshold": 1},
    ]
    file, out = json_lines(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    done = run("--checkpoint", with_text, "--input", file, "--output", str(out), "--max-new-tokens", "12")
    assert (done.code, done.out) == (0, "") and "4 of 4 requests done" in done.err
    results = results_of(out)
    assert [result.get("id") for result in results] == ["first", None, 7, "日本"]
    assert [list(result) for result in results] == [["id", *RESULT], RESULT, ["id", *RESULT], ["id", *RESULT]]
    assert [result["mode"] for result in results] == ["diffusion", "ar", "mock_ar", "diffusion"]
    assert len(results[1]["token_ids"]) <= 3 and len(results[3]["token_ids"]) <= 12
    alone = run("--checkpoint", with_text, "--prompt", "the quick", "--max-new-tokens", "40", "--json").result
    assert results[0]["token_ids"] == alone["token_ids"] and results[0]["text"] == alone["text"]
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_flags_fill_in_what_a_line_leaves_out(tmp_path: Path, run: Callable[..., Run]) -> None:
    ids = {"prompt_token_ids": [5]}
    file, out = json_lines(tmp_path / "in", ids, ids | {"seed": 4, "mode": "diffusion"}), tmp_path / "out"
    flags = ["--mode", "ar", "--temperature", "1", "--seed", "3", "--max-new-tokens", "9", "--ignore-eos"]
    assert run("--checkpoint", IDS_ONLY, "--input", file, "--output", str(out), *flags).code == 0
    first, second = results_of(out)
    assert (first["mode"], first["seed"], len(first["token_ids"])) == ("ar", 3, 9)
    assert (second["mode"], second["seed"], len(second["token_ids"])) == ("diffusion", 4, 9)


def test_null_counts_as_not_given(tmp_path: Path, run: Callable[..., Run]) -> None:
    nothing = {name: None for name in ("id", "prompt", "mode", "seed", "stop", "priority", "max_new_tokens")}
    file, out = json_lines(tmp_path / "in", {"prompt_token_ids": [5], **nothing}), tmp_path / "out"
    assert run("--checkpoint", IDS_ONLY, "--input", file, "--output", str(out), "--max-new-tokens", "3").code == 0
    [result] = results_of(out)
    assert list(result) == RESULT and len(result["token_ids"]) <= 3


def numbered(tmp_path: Path, count: int) -> tuple[list[str], Path]:
    lines = [{"id": n, "prompt_token_ids": [5], "mode": "ar", "max_new_tokens": 16 * (n + 1)} for n in range(count)]
    out = tmp_path / "out"
    return ["--checkpoint", IDS_ONLY, "--input", json_lines(tmp_path / "in", *lines), "--output", str(out)], out


def test_lines_are_decoded_together_and_written_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]
) -> None:
    arguments, out = numbered(tmp_path, 40)
    gate = asyncio.Barrier(40)

    async def behave(request: Request) -> None:
        await gate.wait()  # nobody passes before all are there
        await asyncio.sleep(0.02 / int(request.id))

    opened = fake_pair(monkeypatch, behave)
    assert run(*arguments).code == 0
    assert [result["id"] for result in results_of(out)] == list(range(40))
    [settings] = opened
    assert settings.max_sequences == 32
    assert settings.pages == sum(n + 1 for n in range(8, 40)), "room for the 32 longest, and not more"


def test_more_lines_than_the_pair_can_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]
) -> None:
    monkeypatch.setattr("twotower.commands.generate._IN_FLIGHT", 6)
    monkeypatch.setattr("twotower.commands.generate._MAX_SEQUENCES", 3)
    lines = [{"id": n, "prompt_token_ids": [5], "mode": "mock_ar", "max_new_tokens": 1} for n in range(120)]
    file, out = json_lines(tmp_path / "in", *lines), tmp_path / "out"
    done = run("--checkpoint", IDS_ONLY, "--input", file, "--output", str(out))
    assert done.code == 0 and done.err.startswith("120 of 120 requests done")
    assert [result["id"] for result in results_of(out)] == list(range(120))


def test_one_that_fails_is_told_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]
) -> None:
    arguments, out = numbered(tmp_path, 5)
    fake_pair(monkeypatch, lambda request: NumericalError("a NaN") if request.id == "3" else None)
    done = run(*arguments)
    assert done.code == 1 and f"{tmp_path / 'in'}:3: a NaN" in done.err and "4 of 5 requests done" in done.err
    assert [result["id"] for result in results_of(out)] == [0, 1, 3, 4]


@pytest.mark.parametrize(("error", "flags"), [(Unavailable("gone"), []), (NumericalError("a NaN"), ["--strict"])])
def test_a_run_that_breaks_leaves_the_old_file(
    error: TwoTowerError,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Run],
) -> None:
    arguments, out = numbered(tmp_path, 5)
    out.write_text("old")
    fake_pair(monkeypatch, lambda request: error if request.id == "4" else None)
    done = run(*arguments, *flags)
    assert done.code == 1 and done.err.count("\n") == 1 and str(error) in done.err
    assert out.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
