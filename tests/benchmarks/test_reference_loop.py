"""The command itself: a report with every table, and bad arguments refused."""

from pathlib import Path

import pytest

from benchmarks.reference.report import spread
from benchmarks.reference_loop import main
from tests.goldens import GOLDEN_DIR, MODELS

QUICK = ["--quick", "--threads", "1", "--max-new-tokens", "16", "--paths", "naive,in_process", "--concurrency", "1,2"]


@pytest.mark.long
def test_report(tmp_path: Path) -> None:
    output = tmp_path / "new" / "report.md"
    assert main([*QUICK, "--checkpoint", str(GOLDEN_DIR / MODELS[0]), "--output", str(output)]) == 0
    report = output.read_text()
    for heading in ("## Configuration", "## CPU threads", "## Tower passes at batch 1", "## Throughput"):
        assert heading in report
    rows = [line for line in report.splitlines() if line.startswith(("| diffusion", "| ar"))]
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        same, _, number = row.rstrip(" |").rpartition("| ")[2].partition(" of ")
        assert same == number, row
    assert "## Cold start" not in report


def test_a_directory_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path / "none")]) == 2
    assert "no such directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--paths", "naive,other"],
        ["--modes", "fast"],
        ["--concurrency", "0"],
        ["--max-new-tokens", "20"],
        ["--confidence-threshold", "nan"],
    ],
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "got" in capsys.readouterr().err


def test_spread_is_median_with_extremes() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2.0 (1.0–3.0)"
