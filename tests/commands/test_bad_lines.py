"""Lines of a file of prompts that cannot be served: told by number, skipped, or refused as a whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands.running import IDS_ONLY, Run, fake_pair, json_lines, results_of

BAD_LINES: list[tuple[str | bytes, str]] = [
    ('{"prompt_token_ids": [5]', "broken JSON"),
    ("[1]", "line: got an array, wanted a JSON object"),
    (b'{"prompt_token_ids": [5], "id": "\xff"}', "bytes that are not UTF-8 at position 33"),
    ("[" * 100_000, "nested too deeply"),
    ('{"seed": ' + "9" * 5000 + "}", "broken JSON"),
    ("{}", "prompt: got neither"),
    ('{"prompt": "x", "prompt_token_ids": [5]}', "prompt: got both"),
    ('{"prompt": "x"}', "prompt: got text, but this checkpoint has no tokenizer"),
    ('{"prompt_token_ids": [5], "max_tokens": 5}', "max_tokens: unknown field"),
    ('{"prompt_token_ids": [5], "id": [1]}', "id: got a list"),
    ('{"prompt_token_ids": [5], "id": "\\ud800"}', "line: got half a surrogate pair"),
    ('{"prompt_token_ids": 5}', "prompt_token_ids: got 5, wanted a list"),
    ('{"prompt_token_ids": []}', "prompt: got an empty prompt"),
    ('{"prompt_token_ids": [5, 128]}', "prompt_token_ids[1]: got 128, wanted a token id from 0 to 127"),
    ('{"prompt_token_ids": [5], "temperature": NaN}', "NaN is not a JSON number"),
    ('{"prompt_token_ids": [5], "seed": 1, "seed": 2}', "line: got broken JSON: 'seed' is there twice"),
    ('{"prompt_token_ids": null}', "prompt: got neither"),
    ('{"prompt_token_ids": [5], "max_new_tokens": "5"}', "max_new_tokens: got '5'"),
    ('{"prompt_token_ids": [5], "max_new_tokens": 4096}', "wanted at most 4096"),
    ('{"prompt_token_ids": [5], "stop": 3}', "stop: got 3"),
    ('{"prompt_token_ids": [5], "priority": true}', "priority: got True, wanted an integer from -2147483648"),
    ('{"prompt_token_ids": [5], "priority": "1"}', "priority: got '1'"),
]


def test_bad_lines_are_told_by_number_and_skipped(tmp_path: Path, run: Callable[..., Run]) -> None:
    good = {"prompt_token_ids": [5], "max_new_tokens": 2, "id": "good", "priority": -3}
    file = json_lines(tmp_path / "in", "", *[line for line, _ in BAD_LINES], "  ", good)
    out = tmp_path / "out"
    done = run("--checkpoint", IDS_ONLY, "--input", file, "--output", str(out))
    assert done.code == 1 and [result["id"] for result in results_of(out)] == ["good"]
    told = done.err.splitlines()
    for number, (_, words) in enumerate(BAD_LINES, 2):
        [line] = [line for line in told if line.startswith(f"{file}:{number}: ")]
        assert words in line and len(line) < 500, line
    assert told[len(BAD_LINES) :] == [f"{file}: {len(BAD_LINES)} bad lines of {len(BAD_LINES) + 1} skipped", told[-1]]


def test_strict_refuses_all_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]) -> None:
    fake_pair(monkeypatch, lambda request: AssertionError("a tower was touched"))
    file = json_lines(tmp_path / "in", {"prompt_token_ids": [5]}, "{", {"prompt_token_ids": [6]})
    done = run("--checkpoint", IDS_ONLY, "--input", file, "--output", str(tmp_path / "out"), "--strict")
    assert done.code == 2 and f"{file}:2: " in done.err and "1 bad lines of 3" in done.err
    assert not (tmp_path / "out").exists()


def test_no_good_line_at_all_and_none_at_all(tmp_path: Path, run: Callable[..., Run]) -> None:
    out = tmp_path / "out"
    done = run("--checkpoint", IDS_ONLY, "--input", json_lines(tmp_path / "in", "{"), "--output", str(out))
    assert done.code == 2 and not out.exists()
    done = run("--checkpoint", IDS_ONLY, "--input", json_lines(tmp_path / "in", ""), "--output", str(out))
    assert done.code == 0 and out.read_bytes() == b""


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("missing", "out", "No such file"),
        (".", "out", "directory"),
        ("in", "no/such/folder/out", "No such file"),
        ("in", ".", "not a regular file"),
        ("in", "in", "is the --input file"),
    ],
)
def test_files_that_cannot_be(source: str, target: str, words: str, tmp_path: Path, run: Callable[..., Run]) -> None:
    json_lines(tmp_path / "in", {"prompt_token_ids": [5]})
    done = run("--checkpoint", IDS_ONLY, "--input", str(tmp_path / source), "--output", str(tmp_path / target))
    assert done.code == 2 and done.err.count("\n") == 1 and words in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("flags", "line", "words"),
    [
        (
            ["--mode", "ar", "--presence-penalty", "0.5"],
            {"mode": "diffusion"},
            "presence_penalty: got 0.5, but presence_penalty is not supported in diffusion",
        ),
        (["--block-size", "8"], {"mode": "ar"}, "block_size: got 8, but block_size has no meaning in ar mode"),
    ],
)
def test_a_flag_without_a_meaning_in_a_lines_mode_is_refused_for_that_line(
    flags: list[str], line: dict[str, Any], words: str, tmp_path: Path, run: Callable[..., Run]
) -> None:
    common = {"prompt_token_ids": [5], "max_new_tokens": 2}
    file, out = json_lines(tmp_path / "in", common | {"id": "good"}, common | line), tmp_path / "out"
    done = run("--checkpoint", IDS_ONLY, "--input", file, "--output", str(out), *flags)
    assert done.code == 1 and f"{file}:2: {words}" in done.err
    assert [result["id"] for result in results_of(out)] == ["good"]
