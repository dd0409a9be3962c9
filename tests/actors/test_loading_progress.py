"""A tower process says how far its loading is, where the tower is large. Without Ray."""

import dataclasses
import logging
import re

import pytest

from actors.memory import memories
from actors.settings import CellSettings
from actors.towers import ColocatedProcess, ContextProcess, DenoiserProcess, TowerProcess
from tests.goldens import VENDORED
from twotower.engine.settings import EngineSettings


async def _said(kind: type[TowerProcess], placement: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    engine = EngineSettings(capture="off")  # what is recorded takes longer than all else
    settings = CellSettings(str((VENDORED / "tt_moe").resolve()), device="cpu", placement=placement, engine=engine)
    process = kind(settings)
    with caplog.at_level(logging.INFO):
        await process.load()
    process.runner.stop()
    return [record.message for record in caplog.records if record.name == "actors.loading_progress"]


@pytest.fixture(autouse=True)
def lines_reach_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not this process's stderr, where a tower process sends them."""
    monkeypatch.setattr("actors.towers.log_to_stderr", lambda: None)
    monkeypatch.setattr(logging.getLogger("actors"), "propagate", True)


@pytest.mark.parametrize(
    ("kind", "placement", "towers"),
    [
        (ContextProcess, "split", ["context tower"]),
        (DenoiserProcess, "split", ["denoiser tower"]),
        (ColocatedProcess, "colocated", ["context tower", "denoiser tower"]),
        (ColocatedProcess, "ar_only", ["context tower"]),
    ],
)
async def test_every_tenth_part_of_a_large_tower(
    kind: type[TowerProcess],
    placement: str,
    towers: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("actors.loading_progress._QUICK_BYTES", 0)
    lines = [
        re.fullmatch(r"loading the ([a-z]+ tower): (\d+) of (\d+) tensors \((\d+) %\)", line)
        for line in await _said(kind, placement, caplog)
    ]
    assert all(lines) and [line[1] for line in lines if line] == [tower for tower in towers for _ in range(10)]
    for line in filter(None, lines):
        assert int(line[4]) == 100 * int(line[2]) // int(line[3])
    assert [line[4] for line in lines if line and line[2] == line[3]] == ["100"] * len(towers)


async def test_a_small_tower_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    assert await _said(ContextProcess, "split", caplog) == []


async def test_a_process_holds_experts_in_the_format_that_is_set(caplog: pytest.LogCaptureFixture) -> None:
    """It reads as many tensors as ever, and what it has told of its memory is what it takes."""
    engine = EngineSettings(capture="off", experts="int4", expert_group=16, max_sequences=2, max_sequence_length=64)
    settings = CellSettings(str((VENDORED / "tt_moe").resolve()), device="cpu", placement="colocated", engine=engine)
    process = ColocatedProcess(settings)
    context, denoiser = process._context_tower, process._denoiser_tower
    await process.load()
    process.runner.stop()
    towers = context(), denoiser()
    assert "int4 unpacked expert by expert" in towers[0].kernels
    [told] = memories(settings)
    assert told.weights == sum(tensor.nbytes for tower in towers for tensor in tower.state_dict().values())
    plain = dataclasses.replace(settings, engine=EngineSettings(max_sequences=2, max_sequence_length=64))
    assert told.weights < memories(plain)[0].weights
