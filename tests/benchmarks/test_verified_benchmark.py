"""The benchmark of verified drafts: every answer is `ar`'s, and the report has what it should."""

from pathlib import Path

import pytest

from benchmarks.verified import main, render
from benchmarks.verified_parts.experiment import Cost, Experiment, Found, Plan, identical
from twotower.core import Mode


@pytest.mark.long
def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.md"
    arguments = ["--in-process", "--clients", "1,2", "--requests", "3", "--rounds", "1", "--repetitions", "1"]
    assert main([*arguments, "--max-new-tokens", "24", "--output", str(output)]) == 0
    report = output.read_text()
    assert report.strip() == capsys.readouterr().out.strip()
    verified = [line for line in report.splitlines() if line.startswith("| ") and "| verified |" in line]
    assert len(verified) == 3 and all("3 of 3" in line for line in verified[:2])
    assert "verified read, ms" in report and "--requests 3" in report


def test_the_floor_counts_what_each_mode_reads() -> None:
    from benchmarks.verified_parts.bare import KINDS, Seconds

    experiment = Experiment.__new__(Experiment)
    experiment.plan, experiment.found = Plan((2,), 3, 1, 1, 2, 0.6), Found()
    experiment.found.bare[2] = Seconds(2, dict(zip(KINDS, (1.0, 10.0, 100.0, 1000.0, 0.5), strict=True)))
    experiment.found.costs = {
        Mode.AR: Cost(13, 0, 13, 0, 0),
        Mode.DIFFUSION: Cost(13, 8, 5, 0, 0),
        Mode.VERIFIED: Cost(13, 6, 4, 9, 6),
    }
    assert experiment.floor_s(Mode.AR, 2) == 10 * 1000 / 2 + 1.5
    assert experiment.floor_s(Mode.DIFFUSION, 2) == (8 + 2 * 10) / 2 + 1.5
    assert experiment.floor_s(Mode.VERIFIED, 2) == (6 + 4 * 100) / 2 + 1.5
    assert identical([], []) == (0, 0) and callable(render)
