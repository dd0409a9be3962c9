"""The engine benchmark on a tiny model: everything runs once, and the report has every line of the table of targets."""

from pathlib import Path

import pytest

from benchmarks.engine import main
from benchmarks.engine_parts.experiment import Experiment
from benchmarks.engine_parts.figures import Figures
from benchmarks.engine_parts.plan import Plan, Questions
from benchmarks.engine_parts.report import render
from tests.goldens import MODELS, golden
from twotower.core import Mode


def _plan() -> Plan:
    return Plan(
        golden(MODELS[0]).checkpoint,
        concurrency=(1, 2),
        thresholds=(0.5,),
        max_new_tokens=32,
        prompts=2,
        per_client=1,
        rounds=1,
        pass_s=0.0,
        watched_per_client=1,
        arrivals_per_client=2,
        long_prompt=1000,
        profile_s=1,
        served=False,
        capture="off",
    )


@pytest.mark.slow
async def test_everything_once() -> None:
    experiment = Experiment(_plan())
    results = await experiment.run()
    squares = Figures(experiment).squares()
    assert [(v.mode, c) for v, c in squares] == [(m, c) for m in (Mode.DIFFUSION, Mode.AR) for c in (1, 2)]
    for square in squares:
        [loaded] = results.split[square]
        assert all(len(answer.token_ids) == 32 for answer in loaded.run.answers)
        assert set(loaded.cpu_s) == {"client", "context", "denoiser"}
    [diffusion] = results.demands
    assert results.split[diffusion, 1][0].run.mean_steps == results.demands[diffusion].steps
    commits = {c.what for r in results.watched[diffusion, 2].recordings.values() for c in r.crossings}
    assert commits == {"submitted", "received", "sent", "polled"}
    assert [len(seen.chunks) for seen in results.long_prompts.values()] == [2, 2]  # 1000 tokens by 512
    report = render(experiment, "the command")
    for measure in (
        "throughput ÷ ceiling of bare passes, ar, concurrency 2",
        "AR step in the engine",
        "throughput ÷ naive loop, diffusion γ 0.5, concurrency 1",
        "share of time the denoiser computes while ≥ 2 are active",
        "time between committed blocks ÷ steps, p99 ÷ p50",
        "longest time between steps while a 1000-token prompt is read",
        "tick time outside the model forward, denoiser tower",
        "tensor bytes predicted at start ÷ allocated, context tower",
    ):
        assert f"| {measure}" in report
    assert "| yes |" in report and "## Profile" in report
    assert "served over gRPC" not in report


def test_questions_go_round_and_are_named_apart() -> None:
    plan = _plan()
    questions = Questions(plan)
    asked = questions.requests(plan.variants[0], 4, "a")
    assert [r.prompt_token_ids for r in asked[:2]] == [r.prompt_token_ids for r in asked[2:]]
    assert len({r.id for r in asked}) == 4
    long = questions.long(plan.variants[1], "long")
    assert len(long.prompt_token_ids) == 1000
    assert long.positions <= plan.engine.max_sequence_length
    assert plan.requests_at(2) == 2


def test_a_directory_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path / "none")]) == 2
    assert "no such directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--concurrency", "0"], ["--confidence-thresholds", "2"], ["--max-new-tokens", "16"], ["--capture", "maybe"]],
)
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
