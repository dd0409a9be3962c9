"""Checkpoint directories of other shapes, made from the golden ones."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.goldens import VENDORED

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def config_of(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((VENDORED / name / "config.json").read_text())
    return values


def tensors_of(name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted((VENDORED / name).glob("model*.safetensors")):
        tensors |= load_file(path)
    return tensors


def base_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A two-tower checkpoint's context tower under the names of a single-tower base."""
    base = {
        name.replace("context_tower.", "backbone."): t for name, t in tensors.items() if name.startswith("context_")
    }
    base["lm_head.weight"] = base.pop("context_lm_head.weight")
    return base


def write(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """A checkpoint in one file."""
    write_config(directory, config)
    save_file(tensors, directory / SINGLE)
    return directory


def write_config(directory: Path, config: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))


def write_sharded(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any], shards: int = 3) -> Path:
    """A checkpoint in several files with an index, neighbours in different files."""
    write_config(directory, config)
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard::shards]
        save_file({name: tensors[name] for name in mine}, directory / file)
        weight_map |= dict.fromkeys(mine, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory
