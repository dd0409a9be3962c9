"""The picture of a run, and what is said where it cannot be drawn."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from tests.commands.bench.test_figures import LOAD, sample
from twotower.commands.bench.figures import figures_of
from twotower.commands.bench.plot import draw
from twotower.commands.bench.samples import Pass
from twotower.errors import ConfigError

FIGURES = [figures_of([Pass("ar", LOAD, 0, (sample(0, completion_tokens=3),), 1.0, 1, 0.0)], "")]


@pytest.mark.slow
def test_it_is_drawn(tmp_path: Path) -> None:
    draw(FIGURES, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="matplotlib is not installed; pip install matplotlib"):
        draw(FIGURES, tmp_path / "run.png")
