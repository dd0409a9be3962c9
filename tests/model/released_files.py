"""The released checkpoint's files, imitated at full size: headers and an index as they are, weights as holes in files.

Nothing may read their tensors: they are all zeros, 126 GB of them, and take a few megabytes of disk.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from itertools import groupby
from math import prod
from pathlib import Path

import torch

from tests.model.checkpoints import INDEX
from twotower.model.checkpoint import Layout
from twotower.model.loading import stored_tensors
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.planner.released import RELEASED

SHARDS = 24
Header = dict[str, tuple[str, list[int]]]
"""Of each tensor of a shard, safetensors' name of its dtype, and its shape."""
_SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def headers() -> dict[str, Header]:
    """By the shard's name, as the released files share their tensors out: in the order of the model, evenly."""
    with torch.device("meta"):
        towers = ContextTower(RELEASED), DenoiserTower(RELEASED)
    tensors = [
        (name, "F32" if name.endswith("e_score_correction_bias") else "BF16", list(tensor.shape))
        for tower in towers
        for name, tensor in stored_tensors(tower, Layout.TWO_TOWER)
    ]
    whole, before = sum(prod(shape) for _, _, shape in tensors), 0
    placed = []
    for name, kind, shape in tensors:
        placed.append((before * SHARDS // whole, name, kind, shape))
        before += prod(shape)
    return {
        f"model-{number + 1:05}-of-{SHARDS:05}.safetensors": {name: (kind, shape) for _, name, kind, shape in shard}
        for number, shard in groupby(placed, key=lambda place: place[0])
    }


def write_sparse(path: Path, header: Header) -> None:
    """A shard of this header, whose tensors are a hole."""
    told: dict[str, object] = {}
    end = 0
    for name, (kind, shape) in header.items():
        start, end = end, end + prod(shape) * _SIZES[kind]
        told[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(told).encode()
    text += b" " * (-len(text) % 8)
    path.unlink(missing_ok=True)  # it may be a link
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)


def write_released(directory: Path, shards: Mapping[str, Header]) -> Path:
    """All of it: config, index, shards."""
    values = asdict(RELEASED) | {"model_type": "nemotron_h", "experts": None}
    (directory / "config.json").write_text(json.dumps(values))
    for name, header in shards.items():
        write_sparse(directory / name, header)
    weight_map = {tensor: name for name, header in shards.items() for tensor in header}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def linked(directory: Path, of: Path) -> Path:
    """A directory with the same files, to change some of them in."""
    for path in of.iterdir():
        (directory / path.name).symlink_to(path)
    return directory
