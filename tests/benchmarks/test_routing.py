"""`benchmarks.routing`: what it counts is what the routers chose."""

import json
from pathlib import Path
from random import Random

import pytest
import torch

from benchmarks import routing
from benchmarks.routing import Kept, measured, render, routed
from tests.goldens import vendored
from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.planner.passes import Kind
from twotower.planner.routing import Point, of_the_demo

PROMPT = tuple(range(5, 25))


def _requests(mode: Mode) -> list[Request]:
    steps = {"steps_per_block": 2, "confidence_threshold": 1.0} if mode is Mode.DIFFUSION else {}
    params = DecodingParams(mode=mode, max_new_tokens=32 if steps else 4, ignore_eos=True, **steps)
    return [Request(RequestId("r"), PROMPT, params)]


def test_each_kind_of_pass_of_a_tiny_model() -> None:
    model = vendored("tt_moe")
    config, layers = model.checkpoint.config, len(model.checkpoint.config.layers_of("E"))
    found = routed(model.context, model.denoiser, _requests(Mode.DIFFUSION), _requests(Mode.AR))
    shapes = {kind: [tuple(row.shape) for row in rows] for kind, [rows] in found.items()}
    each = (layers, config.num_experts_per_tok)
    assert shapes == {
        Kind.DENOISE: [(16, *each)] * 4,  # two blocks of two steps
        Kind.COMMIT: [(16, *each)],  # the last block is not read
        Kind.STEP: [(1, *each)] * 4,
        Kind.PREFILL: [(len(PROMPT), *each)],
    }


def test_a_tower_is_left_as_it_was() -> None:
    model = vendored("tt_moe")
    hooks = [len(module._forward_hooks) for module in model.context.modules()]
    with Kept(model.context) as kept:
        assert kept.take() == []
    assert [len(module._forward_hooks) for module in model.context.modules()] == hooks


def test_means_are_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Position p of prompt n chooses expert p % 4 and expert 4 + n % 2: one row of 16 touches 5, two rows or more 6
    as soon as they differ."""
    monkeypatch.setattr(routing, "_DRAWS", 5)
    rows = [[torch.tensor([[[p % 4, 4 + n % 2]] * 3 for p in range(16)])] for n in range(32)]
    points = {(p.rows, p.positions): p for p in measured(Kind.COMMIT, rows, 8, Random(0))}
    assert points[1, 1].touched == 2.0 and points[1, 16].touched == 5.0 and points[16, 16].touched == 6.0
    assert points[1, 16].off == 0.0 and 5.0 < points[2, 16].touched <= 6.0
    assert "| commit | 1 | 16 | 5.00 ± 0.00 |" in render({Kind.COMMIT: list(points.values())})


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(SystemExit, match="commit: got 0 prompts with 16 positions, wanted at least 32"):
        measured(Kind.COMMIT, [[torch.zeros(8, 1, 2)]] * 40, 8, Random(0))


def test_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what the planner reads."""
    monkeypatch.setattr("twotower.planner.routing._FILE", tmp_path / "routing.json")
    about: dict[str, str | int] = {
        "checkpoint": "0", "date": "2026-11-30", "command": "c", "n_routed_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    text = routing._told(about, {Kind.COMMIT: [Point(1, 1, 2.0, 0.0), Point(1, 16, 6.0, 0.1)]})
    (tmp_path / "routing.json").write_text(text)
    assert json.loads(text)["points"] == {"commit": [[1, 1, 2.0, 0.0], [1, 16, 6.0, 0.1]]}
    read = of_the_demo.__wrapped__()
    assert read.points[Kind.COMMIT][1] == Point(1, 16, 6.0, 0.1) and (read.experts, read.chosen) == (8, 2)
