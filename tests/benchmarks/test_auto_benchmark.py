"""The benchmark of `auto`: its answers are `ar`'s, and the report has what it should."""

from pathlib import Path

import pytest

from benchmarks.auto import WAYS, main


@pytest.mark.slow
def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.md"
    arguments = ["--clients", "2", "--requests", "2", "--per-client", "1", "--rounds", "1", "--max-new-tokens", "20"]
    assert main([*arguments, "--loads", "demo,mixed", "--output", str(output)]) == 0
    report = output.read_text()
    assert report.strip() == capsys.readouterr().out.strip()
    speeds = [line for line in report.splitlines() if line.endswith("| 4 of 4 |")]
    assert len(speeds) == 2 and all(way.name in report for way in WAYS)
