"""`benchmarks.wire`: a small run, and what its report says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import wire
from benchmarks.wire import Row, commit_bytes, render
from twotower.planner.passes import kv_bytes, state_bytes
from twotower.planner.released import RELEASED


@pytest.mark.slow
def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(wire, "families_of", lambda _: ("roman",))
    output = tmp_path / "wire.md"
    assert wire.main(["--num-instances", "2", "--wires", "float32", "int8", "--output", str(output)]) == 0
    text = output.read_text()
    assert text.strip() in capsys.readouterr().out
    [plain, rounded] = [line.split(" | ") for line in text.splitlines() if "| verified |" in line]
    assert (plain[4], rounded[4]) == ("100.0 %", "100.0 %"), "`ar`'s tokens, whatever is on the wire"
    plain, rounded = (float(line.split(" | ")[1].removesuffix(" %")) for line in text.splitlines()[-4:-2])
    assert plain == 0 and 0.5 < rounded < 1.5, "states off, in per cent"


def test_the_report() -> None:
    rows = [Row("int8", "diffusion 0.8", 0.5, 6.0, 0.25, None, "–")]
    text = render({"commit": "abc"}, rows, [["int8", "1.00 %", "10", "0.01"]])
    assert "| int8 | diffusion 0.8 | 50.0 % | 6.000 | 25.0 % | – | – |" in text and "| int8 | 1.00 % | 10 |" in text


def test_bytes_are_those_of_the_planner() -> None:
    planned = state_bytes(RELEASED) + 16 * kv_bytes(RELEASED)
    assert commit_bytes(RELEASED, "float32", torch.bfloat16) == planned
    assert commit_bytes(RELEASED, "int8", torch.bfloat16) < 0.28 * planned


def test_the_first_wire_is_what_others_are_compared_with(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        wire.main(["--wires", "int8"])
    assert "got int8 first, wanted float32" in capsys.readouterr().err
