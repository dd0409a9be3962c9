"""What the ops page knows of γ: the record beside the checkpoint, and why there is none."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from benchmarks.quality_parts.tuned import tuned
from cluster.board.trade import RECORD, Trade, add_trade
from cluster.cli.tune.questions import Question
from cluster.cli.tune.report import Findings
from cluster.cli.tune.sweep import AR, VERIFIED, Answered, Pass, Way
from cluster.served_paths import checkpoint_directory
from tests.cluster.fakes import FINGERPRINT, served_model
from twotower.core import DecodingParams, Mode
from twotower.model.checkpoint import Checkpoint

RESULT = Path(__file__).parents[3] / "benchmarks" / "results" / "quality_cpu_2026-11-30.json"


def of(directory: Path, modes: tuple[Mode, ...] = tuple(Mode), defaults: DecodingParams | None = None) -> Trade:
    return Trade(directory, served_model(None, modes, defaults))


def swept() -> dict[str, Any]:
    """What `tune --output DIRECTORY/tuned` writes, of a service with the fakes' checkpoint."""
    answers = [Answered("", (5, 6, 7, 8), steps) for steps in (2, 2)]
    ways = ((AR, 2.0), (Way(Mode.DIFFUSION, 0.8), 1.0), (VERIFIED, 1.25))
    passes = [Pass(way, tuple(answers), seconds) for way, seconds in ways]
    findings = Findings.of([Question(1, (5,)), Question(2, (6,))], passes, 0.5)
    return {"address": "10.0.0.7:50051", "checkpoint": FINGERPRINT, "concurrency": 16, **findings.figures()}


def written(directory: Path, record: object) -> Path:
    (directory / RECORD).write_text(record if isinstance(record, str) else json.dumps(record), encoding="utf-8")
    return directory


async def told_over_http(one: Trade) -> dict[str, Any]:
    app = FastAPI()
    add_trade(app, one)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fake") as http:
        response = await http.get("/ops/trade")
        assert (await http.post("/ops/trade")).status_code == 405
    assert response.status_code == 200 and response.headers["cache-control"] == "no-store"
    body: dict[str, Any] = response.json()
    return body


async def test_what_tune_writes_beside_the_checkpoint_is_told(tmp_path: Path) -> None:
    one = of(tmp_path, defaults=DecodingParams(confidence_threshold=0.9))
    assert one.told().why == "the checkpoint brings no tuned.json"
    told = await told_over_http(of(written(tmp_path, swept())))
    assert (told["mode"], told["threshold"], told["why"]) == ("diffusion", 0.8, "")
    assert [way["threshold"] for way in told["record"]["ways"]] == [None, 0.8]
    assert told["record"]["ways"][1]["times_ar"] == 2.0 and told["record"]["ways"][1]["tokens_per_step"] == 2.0
    verified = told["record"]["verified"]
    assert (verified["times_ar"], verified["same_as_ar"], verified["recommended"]) == (1.6, True, False)
    assert "address" not in told["record"], "no address of anybody is shown"
    now = one.told()
    assert now.record is not None and now.threshold == 0.9, "written while the service runs"


def changed(**values: object) -> dict[str, Any]:
    return swept() | values


WAY = swept()["ways"][1]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (changed(checkpoint="beef"), f"got the figures of checkpoint 'beef', wanted {FINGERPRINT}"),
        ("{", "Invalid JSON"),
        ("[]", "Input should be an object"),
        (changed(prompts="many"), "prompts: Input should be a valid integer, got 'many'"),
        (changed(ways=[WAY, WAY]), "wanted ar (threshold null) first"),
        (changed(ways=[swept()["ways"][0], WAY, WAY]), "then each threshold once"),
        (changed(ways=[swept()["ways"][0], WAY | {"times_ar": 0}]), "ways.1.times_ar: Input should be greater than 0"),
        (changed(ways=[swept()["ways"][0], WAY | {"low": "a"}]), "ways.1.low: Input should be a valid number, got 'a'"),
        (
            changed(verified=swept()["verified"] | {"threshold": 0.5}),
            "verified.threshold: Input should be null, got 0.5",
        ),
        (changed(verified=WAY), "verified.threshold: Input should be null"),
        ({"checkpoint": FINGERPRINT}, "quality: Field required"),
        (" " * 2**21, "got 2097152 bytes, wanted at most 1048576"),
    ],
)
def test_a_record_that_is_none_says_why(tmp_path: Path, record: object, why: str) -> None:
    told = of(written(tmp_path, record)).told()
    assert told.record is None and told.why.startswith("tuned.json: ") and why in told.why


def test_a_record_of_before_verified_was_measured_is_told(tmp_path: Path) -> None:
    old = swept()
    del old["verified"]
    told = of(written(tmp_path, old)).told()
    assert told.why == "" and told.record is not None and told.record.verified is None and len(told.record.ways) == 2


def test_without_a_denoiser_there_is_nothing_to_choose(tmp_path: Path) -> None:
    told = of(written(tmp_path, swept()), modes=(Mode.AR,)).told()
    assert told.record is None and "no diffusion" in told.why


def test_the_demo_brings_the_record_that_follows_from_the_benchmark_s_result() -> None:
    directory = checkpoint_directory("demo")
    model = replace(served_model(), fingerprint=Checkpoint.open(directory).fingerprint)
    told = Trade(directory, model).told()
    assert told.why == "" and told.record is not None
    shipped = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    assert shipped == tuned(json.loads(RESULT.read_text(encoding="utf-8")))
    usual = next(way for way in told.record.ways if way.threshold == 0.8)
    assert (usual.quality, usual.tokens_per_step) == (0.9863, 6.7525), "as docs/benchmarks.md has it"
