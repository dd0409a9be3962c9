"""The benchmark of prompts that begin alike: prompts are what it says, and answers that differ fail it."""

from pathlib import Path

import pytest

from benchmarks.prefix import Asked, Found, _prompts, main, render


def test_prompts_share_what_is_said_and_no_more() -> None:
    prompts = _prompts(200, 0.9, 4)
    assert [len(prompt) for prompt in prompts] == [200] * 4
    assert len({prompt[:180] for prompt in prompts}) == 1 and len({prompt[180:] for prompt in prompts}) == 4


def test_ratios_are_of_one_question() -> None:
    found = Found(
        [Asked(2.0, 1.0, 0, (1,)), Asked(4.0, 2.0, 0, (2,))], [Asked(1.0, 0.5, 64, (1,)), Asked(1.0, 1.0, 64, (2,))]
    )
    assert found.ratios("seconds") == [0.5, 0.25] and found.ratios("cpu") == [0.5, 0.5] and found.same
    assert "| ar | 3000 (2000–4000) | 1000 (1000–1000) | 0.375 (0.250–0.500) |" in render({"ar": found})
    found.kept[1].answer = (3,)
    assert not found.same and "DIFFER" in render({"ar": found})


@pytest.mark.slow
def test_a_short_run(tmp_path: Path) -> None:
    output = tmp_path / "result.md"
    assert main(["--tokens", "256", "--chunk", "32", "--rounds", "1", "--output", str(output)]) == 0
    rows = [line for line in output.read_text().splitlines() if line.endswith("| the same |")]
    assert len(rows) == 4 and all("| 224 |" in row for row in rows)
