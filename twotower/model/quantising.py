"""Makes a checkpoint with quantised experts from one without, shard by shard.

The files are written into a directory beside the requested one and renamed at the end. So the requested directory is
complete or missing. Shards that an earlier run has finished are not made again.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from twotower.errors import CheckpointError
from twotower.expert_formats import ExpertFormat, quantised_values
from twotower.model.checkpoint import INDEX, SINGLE, Checkpoint, Layout, Stored
from twotower.model.loading import plan_of
from twotower.model.quantised import quantise
from twotower.model.tower import ContextTower, DenoiserTower

_EXPERT = re.compile(r"\.mixer\.experts\.[0-9]+\.(up|down)_proj\.weight$")
_STATE = "quantising.json"
# Files of the source that do not hold for other weights: measurements, cards, expectations.
_ITS_OWN = {"config.json", INDEX, "expectation.json", "tuned.json", _STATE}
_TAKEN_ALONG = (".json", ".jinja", ".model", ".txt", "")
_LARGEST_COPIED = 64 << 20


@dataclass(frozen=True)
class Quantising:
    """The plan for quantising a checkpoint. `tensors`: all tensors in its files that towers read; `matrices`: the names
    of the experts' matrices among them.
    """

    checkpoint: Checkpoint
    output: Path
    form: ExpertFormat
    tensors: tuple[Stored, ...]
    matrices: frozenset[str]

    @classmethod
    def of(cls, source: Path, form: ExpertFormat, output: Path) -> "Quantising":
        """Checks everything that can be checked before a tensor is read. Raises CheckpointError."""
        checkpoint = Checkpoint.open(source, form)
        if not checkpoint.quantises:
            raise CheckpointError(f"{source}: its experts are {checkpoint.config.experts} already")
        if output.exists():
            raise CheckpointError(f"{output}: exists already, wanted a directory to make")
        if not output.resolve().parent.is_dir():
            raise CheckpointError(f"{output}: no such directory as {output.resolve().parent}")
        kinds: list[type[ContextTower] | type[DenoiserTower]] = [ContextTower]
        if checkpoint.layout is Layout.TWO_TOWER:
            kinds.append(DenoiserTower)
        tensors = tuple(tensor for kind in kinds for tensor in plan_of(checkpoint, kind).tensors)
        matrices = frozenset(tensor.name for tensor in tensors if _EXPERT.search(tensor.name))
        made = cls(checkpoint, output, form, tensors, matrices)
        made._check_room()
        return made

    @property
    def part(self) -> Path:
        """The directory of the files until all of them are complete."""
        return self.output.with_name(f"{self.output.name}.part")

    @property
    def before(self) -> int:
        """Bytes to read."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def after(self) -> int:
        """Bytes to write, without headers."""
        return sum(self._bytes_of(tensor) for tensor in self.tensors)

    def _bytes_of(self, tensor: Stored) -> int:
        if tensor.name not in self.matrices:
            return tensor.nbytes
        outputs, groups, nbytes = self.form.packed(*tensor.shape)
        return outputs * groups * (nbytes + (2 if self.form.group else 4))

    def _check_room(self) -> None:
        there = sum(path.stat().st_size for path in self.part.glob("*.safetensors"))
        free, wanted = shutil.disk_usage(self.output.resolve().parent).free, self.after - there
        if wanted > free:
            raise CheckpointError(
                f"{self.output}: got {free / 1e9:.2f} GB free there, wanted {wanted / 1e9:.2f} GB for what is written"
            )


def quantise_checkpoint(work: Quantising, device: torch.device, progress: bool = False) -> None:
    """Make the checkpoint. Host memory holds one shard of the output. Raises CheckpointError."""
    _begin(work)
    weight_map: dict[str, str] = {}
    with tqdm(total=work.before, desc="quantising", unit="B", unit_scale=True, disable=not progress) as bar:
        for shard, tensors in _by_shard(work):
            weight_map |= dict.fromkeys(_names_of(work, tensors), shard)
            if (work.part / shard).exists():
                bar.update(sum(tensor.nbytes for tensor in tensors))
            else:
                _write_shard(work, shard, tensors, device, lambda tensor: bar.update(tensor.nbytes))
    if set(weight_map.values()) != {SINGLE}:
        index = {"metadata": {"total_size": work.after}, "weight_map": weight_map}
        _write(work.part / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    _take_along(work)
    (work.part / _STATE).unlink()
    work.part.rename(work.output)


def _begin(work: Quantising) -> None:
    """Make the directory, or continue in an earlier run's if its source and format are the same."""
    state = {"source": work.checkpoint.fingerprint, "experts": work.form.as_config()}
    if not work.part.exists():
        work.part.mkdir()
        _write(work.part / _STATE, json.dumps(state))
        return
    try:
        found = json.loads((work.part / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != state:
        raise CheckpointError(f"{work.part}: is of another run, of other weights or to another format; remove it")


def _by_shard(work: Quantising) -> Iterator[tuple[str, list[Stored]]]:
    for file in sorted({tensor.file for tensor in work.tensors}):
        yield file.name, [tensor for tensor in work.tensors if tensor.file == file]


def _names_of(work: Quantising, tensors: list[Stored]) -> Iterator[str]:
    for tensor in tensors:
        yield tensor.name
        if tensor.name in work.matrices:
            yield f"{tensor.name}_scale"


def _write_shard(
    work: Quantising, shard: str, tensors: list[Stored], device: torch.device, told: Callable[[Stored], object]
) -> None:
    made: dict[str, Tensor] = {}
    with work.checkpoint.reading() as reader:
        for tensor in tensors:
            held = reader.tensor(tensor.name)
            if tensor.name in work.matrices:
                try:
                    packed = quantise(held.to(device), work.form)
                except CheckpointError as error:
                    raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r}: {error}") from error
                made[tensor.name], made[f"{tensor.name}_scale"] = (part.cpu() for part in packed)
            else:
                made[tensor.name] = held.clone()
            told(tensor)
    part = work.part / f"{shard}.part"
    save_file(made, part, metadata={"format": "pt"})
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(work.part / shard)


def _take_along(work: Quantising) -> None:
    """Copy the tokenizer, the chat template and licences, and write the config with the experts' new format."""
    source = work.checkpoint.directory
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    values.pop("auto_map", None)
    values |= quantised_values(work.form)
    _write(work.part / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
    for path in sorted(source.iterdir()):
        fits = path.suffix in _TAKEN_ALONG and path.name not in _ITS_OWN and not path.name.startswith(".")
        if fits and path.is_file() and path.stat().st_size <= _LARGEST_COPIED:
            shutil.copyfile(path, work.part / path.name)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
