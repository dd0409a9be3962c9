"""A command that is shown works when it is pasted."""

from pathlib import Path

import pytest

from cluster.cli import asking
from cluster.ops import run_state
from cluster.ops.invocation import command
from twotower.errors import ConfigError, Unavailable


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of its own, which runs us and is not active."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return python


def test_below_us(environment: Path) -> None:
    assert command("up") == ".venv/bin/python -m cluster up"


def test_elsewhere(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    assert command("status") == f"{environment} -m cluster status"


def test_active(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(environment.parent))
    assert command("up") == "python -m cluster up"


def test_a_path_the_shell_would_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "my files" / "python"))
    monkeypatch.chdir(tmp_path)
    assert command("up") == "'my files/python' -m cluster up"


def test_errors_name_it(environment: Path) -> None:
    with pytest.raises(ConfigError, match=r"start one with: \.venv/bin/python -m cluster up$"):
        run_state.the_one(None)
    with pytest.raises(Unavailable, match=r"start one with: \.venv/bin/python -m cluster up$"):
        asking.model_info("127.0.0.1:1")
