"""What `make test` makes of tests that fail: pytest is a script here."""

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def run_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("run_tests")
    monkeypatch.setattr(script, "_CACHE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_tests.py", "cluster"])
    return script


class Pytest:
    """Stands for it: each run ends at once, with the next of these statuses and failed tests of its part."""

    def __init__(self, runs: dict[str, list[tuple[int, list[str]]]], kept: Path) -> None:
        self._runs, self._kept = runs, kept
        self.asked: list[Sequence[str]] = []
        self.environments: list[dict[str, str]] = []

    def __call__(self, command: Sequence[str], env: dict[str, str], stdout: Any, **_: Any) -> "Ended":
        self.asked.append(command)
        self.environments.append(env)
        [part] = [name for name in self._runs if f"cache_dir={self._kept / name}" in command]
        status, failed = self._runs[part].pop(0)
        kept = self._kept / part / "v" / "cache" / "lastfailed"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(dict.fromkeys(failed, True)))
        if stdout is not None:
            stdout.write(b"pytest's summary\n")
        return Ended(status)


class Ended:
    def __init__(self, status: int) -> None:
        self._status = status

    def wait(self) -> int:
        return self._status


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
    ran = Pytest({"cluster": list(runs)}, tmp_path)
    monkeypatch.setattr(subprocess, "Popen", ran)
    assert run_tests.main() == status and len(ran.asked) == len(runs)
    assert all("--last-failed" in command and "--numprocesses" not in command for command in ran.asked[1:])
    told = capsys.readouterr().out
    assert (said in told) if said else ("look at it" not in told)


def test_a_part_beside_another_yields_to_it_and_is_shown_when_it_has_ended(
    run_tests: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What fails there fails the run, though all of the first passes."""
    monkeypatch.setattr(sys, "argv", ["run_tests.py", "cluster", "slow"])
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    ran = Pytest({"cluster": [(0, [])], "slow": [(1, ["a", "b"]), (1, ["b"])]}, tmp_path)
    monkeypatch.setattr(subprocess, "Popen", ran)
    assert run_tests.main() == 1
    slow, cluster, again = ran.asked
    assert slow[:2] == ["nice", "-n"] and "nice" not in cluster and "nice" not in again
    assert "--timeout=900" in slow and "--last-failed" in again
    assert "PYTHONDONTWRITEBYTECODE" not in ran.environments[0]
    told = capfd.readouterr().out
    assert told.index("the part `slow`:\npytest's summary") < told.index("look at it: a")


def test_each_test_is_in_one_part(run_tests: ModuleType) -> None:
    """But for those of kernels, and long ones, which have their own commands."""
    for has in ((), ("ray",), ("slow",), ("ray", "slow")):
        marked = {name: name in has for name in ("ray", "slow", "long", "kernels")}
        parts = [name for name, (which, *_) in run_tests.PARTS.items() if eval(which, {}, marked)]
        assert len(parts) == 1, f"{has}: {parts}"
        for beyond in ("long", "kernels"):
            assert not any(eval(which, {}, marked | {beyond: True}) for which, *_ in run_tests.PARTS.values())
