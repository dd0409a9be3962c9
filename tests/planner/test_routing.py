"""Experts that passes touch: the demo's, as measured, lie within what must hold of any routing, and carry over."""

import json
from dataclasses import replace

import pytest

from twotower.commands import main
from twotower.commands.orders import directory_of
from twotower.config import ModelConfig
from twotower.errors import ConfigError
from twotower.model.checkpoint import Checkpoint
from twotower.planner.ceilings import Planner
from twotower.planner.devices import DEVICES, ROUTINGS
from twotower.planner.passes import Batch, Kind, uniform
from twotower.planner.released import RELEASED
from twotower.planner.report import figures, text
from twotower.planner.routing import carried_over, of_the_demo, touched_by

DEMO = ModelConfig(n_routed_experts=8, num_experts_per_tok=2)
CONFIGS = pytest.mark.parametrize("config", [RELEASED, DEMO, ModelConfig(n_routed_experts=4, num_experts_per_tok=4)])
KINDS = pytest.mark.parametrize("kind", list(Kind))
ROWS = (1, 2, 3, 4, 8, 16, 64, 256, 4096)


def test_they_are_the_shipped_demos() -> None:
    """A new demo has to be measured anew: `python -m benchmarks.routing`."""
    told, shipped = of_the_demo(), Checkpoint.open(directory_of("demo"))
    assert told.checkpoint == shipped.fingerprint
    assert (told.experts, told.chosen) == (shipped.config.n_routed_experts, shipped.config.num_experts_per_tok)
    assert "benchmarks.routing" in told.command


def test_what_was_measured_is_possible() -> None:
    """One token touches those it chose; more positions and more rows touch more, up to all; uniform is the most."""
    told, most = of_the_demo(), uniform(DEMO)
    for points in told.points.values():
        at = {(point.rows, point.positions): point for point in points}
        assert at[1, 1].touched == told.chosen
        for (rows, positions), point in at.items():
            assert told.chosen <= point.touched <= told.experts
            assert point.touched <= most(rows * positions) + 3 * point.off + 1e-3
            assert rows > 1 or point.touched < told.experts  # or no number of tokens is alike
            more = [other.touched for (r, p), other in at.items() if r >= rows and p >= positions]
            assert point.touched == min(more)


def test_rows_count_as_independent() -> None:
    """The measured passes of several rows touch as many experts as one row's figures say, or some fewer."""
    touched = carried_over(of_the_demo(), DEMO)
    for kind, points in of_the_demo().points.items():
        for point in points:
            told = touched(kind, Batch(point.rows, 0, point.positions))
            assert point.touched - 3 * point.off - 0.02 <= told <= 1.08 * point.touched, (kind, point)


@KINDS
def test_a_pass_of_one_row_is_as_measured(kind: Kind) -> None:
    """On the demo itself nothing is carried over. A check counts as a commit."""
    touched = touched_by("demo", DEMO)
    for point in of_the_demo().points[Kind.COMMIT if kind is Kind.VERIFY else kind]:
        if point.rows == 1:
            assert touched(kind, Batch(1, 0, point.positions)) == pytest.approx(point.touched)


@CONFIGS
@KINDS
def test_bounds(config: ModelConfig, kind: Kind) -> None:
    """As many as a token chooses for one, never fewer for more, never more than uniform routing or than there are."""
    demo, most = touched_by("demo", config), touched_by("uniform", config)
    assert demo(kind, Batch(1, 0, 1)) == pytest.approx(config.num_experts_per_tok)
    for values in (
        [demo(kind, Batch(1, 0, width)) for width in range(1, 600)],
        [demo(kind, Batch(rows, 0, 16)) for rows in ROWS],
    ):
        assert values == sorted(values) and values[-1] <= config.n_routed_experts
    for rows in ROWS:
        for width in (1, 2, 5, 16, 512):
            batch = Batch(rows, 0, width)
            assert config.num_experts_per_tok - 1e-9 <= demo(kind, batch) <= most(kind, batch) + 1e-9


def test_carried_over_by_share_of_experts() -> None:
    """16 positions that choose 6 of 128 are to them what 3 that choose 2 are to 8."""
    measured = {point[:2]: point for point in of_the_demo().points[Kind.DENOISE]}[1, 3].touched
    share = touched_by("demo", RELEASED)(Kind.DENOISE, Batch(1, 0, 16)) / uniform(RELEASED)(16)
    assert share == pytest.approx(measured / uniform(DEMO)(3), rel=0.02) and 0.6 < share < 0.9


def test_the_planner_counts_what_is_assumed() -> None:
    even = Planner(RELEASED, DEVICES["h200"])
    demo = replace(even, routing="demo")
    assert demo.seconds(Kind.DENOISE, 1, 8192) < 0.9 * even.seconds(Kind.DENOISE, 1, 8192)
    assert demo.seconds(Kind.DENOISE, 256, 8192) == pytest.approx(even.seconds(Kind.DENOISE, 256, 8192), rel=1e-3)
    assert demo.seconds(Kind.STEP, 16, 8192) == pytest.approx(even.seconds(Kind.STEP, 16, 8192))
    with pytest.raises(ConfigError, match="routing: got 'even', wanted one of uniform, demo"):
        replace(even, routing="even").seconds(Kind.STEP, 1, 1)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_command_tells_both(routing: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And says of each where it comes from."""
    assert main(["plan", "--routing", routing, "--rows", "1,256", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["routing"]["counted"] == routing
    one, many = (of["denoiser step"] for of in told["routing"]["passes"])
    assert one["uniform"]["experts"] == pytest.approx(69, abs=0.5) and 40 < one["demo"]["experts"] < 64
    assert one[routing]["seconds"] == told["passes"][0]["denoiser step"]["seconds"]
    assert many["demo"]["experts"] == pytest.approx(128, abs=0.1)
    assert told["routing"]["source"]["uniform"].startswith("derived")
    assert told["routing"]["source"]["demo"].startswith(f"measured on {of_the_demo().checkpoint}")


def test_the_text_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--rows", "1", "--routing", "demo"]) == 0
    out = capsys.readouterr().out
    assert "nothing is measured but the demo's routing." in out and "as by demo routing." in out
    assert "uniform: derived: the most on average" in out
    assert f"demo: measured on {of_the_demo().checkpoint} on {of_the_demo().date}" in out
    assert "69 (8.71) → 55 (7.17)" in out


def test_a_model_without_experts_has_no_such_table() -> None:
    planner = Planner(ModelConfig(hybrid_override_pattern="M-M*-"), DEVICES["h200"], routing="demo")
    told = figures(planner, [1], 1024)
    assert told["routing"]["passes"] == []
    assert "Experts of a layer" not in text(told, "nowhere") and "nothing is measured.\n" in text(told, "nowhere")
