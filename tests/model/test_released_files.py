"""Loading at the released size: what each tower would read, and every refusal, from headers alone."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import twotower.model.checkpoint as checkpoint_module
from tests.model.checkpoints import INDEX
from tests.model.released_files import SHARDS, Header, headers, linked, write_released, write_sparse
from twotower.errors import CheckpointError
from twotower.expert_formats import ExpertFormat
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import plan_of
from twotower.model.reading import READERS
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.planner.released import RELEASED
from twotower.planner.weights import weights_of

KINDS = (ContextTower, DenoiserTower)


@pytest.fixture(scope="module")
def shards() -> dict[str, Header]:
    return headers()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, shards: dict[str, Header]) -> Path:
    return write_released(tmp_path_factory.mktemp("released"), shards)


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Any, name: str) -> None:
        raise AssertionError(f"{name} is read")

    monkeypatch.setattr(checkpoint_module.Reader, "tensor", read)


def test_the_files_are_as_large_as_the_released_ones(released: Path) -> None:
    shards = list(released.glob("*.safetensors"))
    assert len(shards) == SHARDS
    assert sum(path.stat().st_size for path in shards) / 2**30 == pytest.approx(117.7, abs=0.2)
    assert sum(path.stat().st_blocks for path in shards) * 512 < 32 << 20


def test_what_each_tower_reads(released: Path) -> None:
    """No tensor twice, none left out, and of the shards only those that hold a tower's own."""
    checkpoint = Checkpoint.open(released)
    context, denoiser = (plan_of(checkpoint, kind) for kind in KINDS)
    names = [tensor.name for plan in (context, denoiser) for tensor in plan.tensors]
    assert len(names) == len(set(names)) and set(names) == set(checkpoint.files)
    experts = 23 * 128 * 2
    for plan, kind in ((context, ContextTower), (denoiser, DenoiserTower)):
        assert sum(".mixer.experts." in tensor.name for tensor in plan.tensors) == experts
        assert plan.nbytes == pytest.approx(weights_of(kind, RELEASED, torch.bfloat16).total, rel=1e-3)
        assert SHARDS // 2 <= len(plan.shards) <= SHARDS // 2 + 1 and plan.of_shards == SHARDS
        assert plan.readers == READERS and plan.largest == 131072 * 2688 * 2
        assert [tensor for run in plan.runs() for tensor in run] == list(plan.tensors)
    assert str(context) == f"context tower: {context.nbytes / 1e9:.2f} GB in {len(context.tensors)} tensors, " + (
        f"{len(context.shards)} of 24 shards"
    )


def test_quantised_at_load_the_same_is_read(released: Path) -> None:
    plain = plan_of(Checkpoint.open(released), ContextTower)
    assert plan_of(Checkpoint.open(released, ExpertFormat(4, 32)), ContextTower) == plain
    with pytest.raises(CheckpointError, match="groups of 128 do not divide 1856"):
        Checkpoint.open(released, ExpertFormat(4, 128))


Change = Callable[[Path, dict[str, Header]], str]
EXPERT = "denoiser_tower.layers.51.mixer.experts.127.up_proj.weight"


def _shard_of(shards: dict[str, Header], tensor: str) -> str:
    return next(name for name, header in shards.items() if tensor in header)


def _index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    values = json.loads((directory / INDEX).read_text())
    change(values["weight_map"])
    (directory / INDEX).unlink()
    (directory / INDEX).write_text(json.dumps(values))


def _rewritten(directory: Path, shards: dict[str, Header], tensor: str, kind: str, shape: list[int]) -> str:
    shard = _shard_of(shards, tensor)
    write_sparse(directory / shard, shards[shard] | {tensor: (kind, shape)})
    return shard


def _missing(directory: Path, shards: dict[str, Header]) -> str:
    _index(directory, lambda names: names.pop(EXPERT) and None)
    return f"tensor '{EXPERT}' is missing"


def _unexpected(directory: Path, shards: dict[str, Header]) -> str:
    shard = _rewritten(directory, shards, EXPERT, *shards[_shard_of(shards, EXPERT)][EXPERT])
    write_sparse(directory / shard, shards[shard] | {"denoiser_tower.layers.52.norm.weight": ("BF16", [2688])})
    _index(directory, lambda names: names.update({"denoiser_tower.layers.52.norm.weight": shard}))
    return f"{shard}: unexpected tensor 'denoiser_tower.layers.52.norm.weight'"


def _shape(directory: Path, shards: dict[str, Header]) -> str:
    shard = _rewritten(directory, shards, EXPERT, "BF16", [1856, 2687])
    return f"{shard}: tensor '{EXPERT}': got shape [1856, 2687], wanted [1856, 2688]"


def _dtype(directory: Path, shards: dict[str, Header]) -> str:
    shard = _rewritten(directory, shards, EXPERT, "F8_E4M3", [1856, 2688])
    return f"{shard}: tensor '{EXPERT}': got dtype F8_E4M3, wanted BF16 or F16 or F32 or F64"


def _cut(directory: Path, shards: dict[str, Header]) -> str:
    shard = _shard_of(shards, EXPERT)
    write_sparse(directory / shard, shards[shard])
    os.truncate(directory / shard, (directory / shard).stat().st_size - 1)
    return f"{shard}: not a whole safetensors file"


def _gone(directory: Path, shards: dict[str, Header]) -> str:
    shard = _shard_of(shards, EXPERT)
    (directory / shard).unlink()
    return f"{shard}: no such file"


def _elsewhere(directory: Path, shards: dict[str, Header]) -> str:
    first = next(iter(shards))
    _index(directory, lambda names: names.update({EXPERT: first}))
    return f"{first}: no tensor '{EXPERT}', which {INDEX} places there"


@pytest.mark.parametrize("change", [_missing, _unexpected, _shape, _dtype, _cut, _gone, _elsewhere])
@pytest.mark.slow
def test_refusals(change: Change, released: Path, shards: dict[str, Header], tmp_path: Path) -> None:
    wanted = change(linked(tmp_path, released), shards)
    with pytest.raises(CheckpointError) as caught:
        plan_of(Checkpoint.open(tmp_path), DenoiserTower)
    assert wanted in str(caught.value) and "\n" not in str(caught.value)
