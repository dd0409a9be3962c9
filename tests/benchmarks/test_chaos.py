"""The short form of `benchmarks.chaos`, and what its parts make of answers and times."""

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.chaos_parts.client import Asked, Load, Question, Right, outcome_of
from benchmarks.chaos_parts.faults import Fault, Hit, Round
from benchmarks.chaos_parts.report import render
from benchmarks.soak import grown
from cluster.runs.answer import Usage
from twotower.core import DecodingParams, Mode

RIGHT = Right((1, 2, 3), "abc", Usage(4, 3, 2, 1), margin=0.5, log_probs=(-1.0,))
QUESTION = Question("grpc", Mode.AR, True, (5,), DecodingParams(), right=RIGHT)


@pytest.mark.parametrize(
    "got",
    [
        replace(RIGHT, tokens=(1, 2, 4)),
        replace(RIGHT, text="ab"),
        replace(RIGHT, usage=Usage(4, 3, 3, 1)),
        replace(RIGHT, log_probs=(-1.1,)),
        replace(RIGHT, log_probs=()),
    ],
)
def test_every_part_of_an_answer_counts(got: Right) -> None:
    assert outcome_of(QUESTION, RIGHT) == "right"
    assert outcome_of(QUESTION, got).startswith("changed ")
    close = replace(QUESTION, right=replace(RIGHT, margin=1e-6))
    assert outcome_of(close, got) == "near tie"


def test_a_stall_is_the_longest_gap_that_the_fault_lies_in_or_that_follows_it() -> None:
    asked = Asked("a", QUESTION, sent=0.0, events=[5.0, 6.0, 8.0], ended=8.5)
    assert [asked.stall_s(fault) for fault in (1.0, 5.5, 8.1, 9.0)] == [5.0, 2.0, 0.5, 0.0]


async def test_what_does_not_end_has_failed() -> None:
    async def never(asked: Asked) -> None:
        await asyncio.Event().wait()

    load = Load(never, [QUESTION], "c")
    load.start(3)
    await asyncio.sleep(0)
    await load.stop(0.01)
    assert [asked.outcome for asked in load.asked] == ["failed: no end within 0.01 s"] * 3
    assert len({asked.label for asked in load.asked}) == 3


def test_the_report_names_what_went_wrong() -> None:
    asked = [Asked("a", QUESTION, 0.0, [1.0], 2.0, outcome) for outcome in ("right", "failed: UNAVAILABLE: gone")]
    done = Round(Fault("cell hung", "step"), 1.5, 9.0, [Hit("step", 0.5, True)], 1, asked, ["idle: a stray"])
    text = render("Faults", [done], {"date": "today"}, None)
    assert "1 faults, 2 requests, 1 of them went on elsewhere: 1 failed, 0 changed" in text
    assert "| cell hung | step | 1 | 1 | 2 | 1 | 1 | 0 | 0 | 0.50 | 0.50 | 9.0 | 1 |" in text
    assert "- cell hung in step: idle: a stray" in text and "UNAVAILABLE: gone (grpc, ar, stream; 1 events" in text


def test_growth_is_told_by_the_second_quarter_and_the_last() -> None:
    assert grown([(float(i), float(i)) for i in range(8)]) == (2.5, 6.5)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_faults(tmp_path: Path) -> None:
    """In a process of its own: it has a Ray of its own."""

    output = tmp_path / "chaos.md"
    command = [sys.executable, "-m", "benchmarks.chaos", "--quick", "--output", str(output)]
    less = ["--clients", "8", "--questions", "8", "--max-new-tokens", "48", "--set", "cell.capture=off"]
    root = Path(chaos.__file__).parents[1]
    done = subprocess.run([*command, *less], cwd=root, capture_output=True, text=True)
    assert output.exists(), done.stderr[-3000:]
    text = output.read_text()
    assert done.returncode == 0 and "2 faults" in text and "Nothing." in text, text
    assert output.with_suffix(".png").stat().st_size > 1000
