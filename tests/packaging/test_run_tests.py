"""What `make test` makes of tests that fail: pytest is a script here."""

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def run_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("run_tests")
    monkeypatch.setattr(script, "_CACHE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_tests.py", "cluster"])
    return script


@pytest.mark.parametrize(
    ("runs", "status", "said"),
    [
        ([(0, [])], 0, None),
        ([(1, ["a"]), (0, [])], 0, "passed alone, look at it: a"),
        ([(1, ["a", "b"]), (1, ["b"])], 1, "passed alone, look at it: a"),
        ([(1, ["a", "b", "c", "d"])], 1, None),
        ([(2, ["a"])], 2, None),
        ([(5, [])], 5, None),
    ],
    ids=["none fails", "fails once", "one fails twice", "many fail", "interrupted", "no tests"],
)
def test_a_few_that_fail_are_run_once_more(
    runs: list[tuple[int, list[str]]],
    status: int,
    said: str | None,
    run_tests: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = list[Sequence[str]]()

    def pytest_run(command: Sequence[str], cwd: Path) -> SimpleNamespace:
        returned, failed = runs[len(asked)]
        asked.append(command)
        kept = tmp_path / "cluster" / "v" / "cache" / "lastfailed"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(dict.fromkeys(failed, True)))
        return SimpleNamespace(returncode=returned)

    monkeypatch.setattr(subprocess, "run", pytest_run)
    assert run_tests.main() == status and len(asked) == len(runs)
    assert all("--last-failed" in command and "--numprocesses" not in command for command in asked[1:])
    told = capsys.readouterr().out
    assert (said in told) if said else ("look at it" not in told)
