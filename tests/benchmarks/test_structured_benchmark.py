"""The benchmark of structured output: it counts what it says, and judges by other libraries than decoding uses."""

from pathlib import Path

import pytest

from benchmarks.structured import CONSTRAINTS, Found, is_valid, main, render
from twotower.core import Mode


def test_what_is_valid() -> None:
    schema, pattern = CONSTRAINTS["JSON of a schema"], CONSTRAINTS["what it says anyway"]
    assert is_valid('{"number": 3, "kind": "roman", "right": true}', schema)
    assert not is_valid('{"number": 3, "kind": "other", "right": true}', schema) and not is_valid("MMM", schema)
    assert is_valid("a b", pattern) and not is_valid("é", pattern) and is_valid("é", None)


def test_passes_are_compared_with_those_of_the_same_mode_without() -> None:
    found = {
        (Mode.DIFFUSION, "none"): Found(2, 2, 2, 30, 5, 5, 1.0),
        (Mode.DIFFUSION, "JSON of a schema"): Found(2, 1, 1, 20, 16, 4, 2.0),
    }
    free, kept = render(found, True).splitlines()[2:4]
    assert free.split(" | ")[2:] == ["2 of 2", "0", "30", "5", "5", "6.00", "1.00", "30", "1.00 |"]
    assert kept.split(" | ")[2:] == ["1 of 1", "1", "20", "16", "4", "1.25", "0.33", "10", "0.33 |"]


@pytest.mark.slow
def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.md"
    assert main(["--per-family", "1", "--max-new-tokens", "48", "--output", str(output)]) == 0
    report = output.read_text()
    assert report.strip() == capsys.readouterr().out.strip()
    rows = [line.split(" | ") for line in report.splitlines() if line.startswith("| ") and " of " in line]
    assert len(rows) == 9
    for row in rows:
        valid, _, whole = row[2].split(" ")
        assert valid == whole, row
