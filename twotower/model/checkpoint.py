"""The released checkpoint layout on disk: which tensor lies in which file, read one at a time.

Knows names and files; `loading.py` turns them into towers.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from safetensors import SafetensorError, safe_open

from twotower.config import ModelConfig
from twotower.core import Mode
from twotower.errors import CheckpointError
from twotower.expert_formats import ExpertFormat

if TYPE_CHECKING:
    from torch import Tensor

CONTEXT_PREFIX, DENOISER_PREFIX, BASE_PREFIX = "context_tower.", "denoiser_tower.", "backbone."
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# All tokenizer files that transformers reads, in every format that checkpoints of this layout have.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
BYTES_OF = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}
"""The dtypes that tensors of this layout may be stored in."""
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_MAPPED_BYTES = 256 * 2**20


class Layout(StrEnum):
    """What a checkpoint holds. Its tensor names decide, because both kinds call themselves `nemotron_h`."""

    TWO_TOWER = "two-tower"
    BASE = "single-tower base"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory: its config and the file of every tensor. No tensor is read yet.

    `quantises`: its experts are stored unquantised, and will be held in `config.experts`' format.
    """

    directory: Path
    config: ModelConfig
    layout: Layout
    files: Mapping[str, Path]
    quantises: bool = False

    @classmethod
    def open(cls, directory: Path | str, experts: ExpertFormat | None = None) -> Self:
        """`experts`: the format in which experts are held; None for the stored one. Raises CheckpointError if the
        directory, its config, its index or a shard is missing or damaged, or the experts have another format.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory")
        config = ModelConfig.load(directory)
        quantises = experts is not None and experts != config.experts
        if quantises and config.experts is not None:
            raise CheckpointError(
                f"{directory}: got experts {experts} for a checkpoint whose experts are {config.experts} already, "
                "wanted `stored` or the checkpoint that it was made from"
            )
        if quantises:
            config = config.with_experts(experts)
        files = _tensor_files(directory)
        return cls(directory, config, _layout(directory, files), files, quantises)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Modes these weights can serve."""
        return tuple(Mode) if self.layout is Layout.TWO_TOWER else (Mode.AR,)

    @property
    def fingerprint(self) -> str:
        """Identifies weights without reading all of them. It covers the config, every shard's size and evenly spaced
        samples, and the format that experts get while they are read.
        """
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        if self.quantises:
            digest.update(str(self.config.experts).encode())
        for shard in sorted(set(self.files.values())):
            size = shard.stat().st_size
            digest.update(f"{shard.name} {size}".encode())
            with shard.open("rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(size * sample // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()[:16]

    @property
    def vocabulary(self) -> str:
        """Identifies the vocabulary: equal for two checkpoints if token ids mean the same, by special ids and tokenizer
        files.
        """
        config = self.config
        ids = (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id)
        digest = hashlib.sha256(repr(ids).encode())
        for name in _TOKENIZER_FILES:
            if (self.directory / name).is_file():
                digest.update(name.encode() + hashlib.sha256((self.directory / name).read_bytes()).digest())
        return digest.hexdigest()[:16]

    def reading(self) -> "Reader":
        """Reads tensors; use as a context manager."""
        return Reader(self)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file's header tells of it; `kind` is safetensors' name of its dtype."""

    name: str
    file: Path
    shape: tuple[int, ...]
    kind: str

    @property
    def nbytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * BYTES_OF[self.kind]


class Reader:
    """Reads a checkpoint's tensors one by one. Only the last tensor's shard stays open, so each shard is opened once if
    names come shard by shard. A big shard is reopened after every `_MAPPED_BYTES`, because the read part of an open
    file counts as the process's memory.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._path: Path | None = None
        self._mapped = 0
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def tensor(self, name: str) -> "Tensor":
        """Read now, on the CPU, in its stored dtype."""
        file = self._shard_of(name)
        try:
            tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._path}: tensor {name!r}: {error}") from error
        self._mapped += tensor.nbytes
        return tensor

    def stored(self, name: str) -> "Stored":
        """From the file's header, without reading the tensor."""
        file = self._shard_of(name).get_slice(name)
        return Stored(name, self._checkpoint.files[name], tuple(file.get_shape()), str(file.get_dtype()))

    def _shard_of(self, name: str) -> "safe_open":
        path = self._checkpoint.files.get(name)
        if path is None:
            raise CheckpointError(f"{self._checkpoint.directory}: no tensor {name!r}")
        if path != self._path or self._mapped > _MAPPED_BYTES:
            self._open.close()
            self._path, self._mapped = None, 0  # and so it stays if the next one cannot be opened
            self._file = self._open.enter_context(_opened(path, "pt"))
            self._path = path
        return self._file


def _tensor_files(directory: Path) -> dict[str, Path]:
    index = directory / INDEX
    if not index.exists():
        path = directory / SINGLE
        if not path.exists():
            raise CheckpointError(f"{directory}: neither {INDEX} nor {SINGLE} is there")
        return dict.fromkeys(_names_in(path), path)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): directory / str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a safetensors index with a weight_map: {error!r}") from error
    for path in sorted(set(files.values())):
        present = set(_names_in(path))
        absent = sorted(name for name, file in files.items() if file == path and name not in present)
        if absent:
            raise CheckpointError(f"{path}: no tensor {absent[0]!r}, which {INDEX} places there")
    return files


def _names_in(path: Path) -> list[str]:
    # With numpy, so that a process that reads only names, like a router, needs no torch.
    with _opened(path, "np") as file:
        return list(file.keys())


class _opened:
    """`safe_open` whose failures name the file."""

    def __init__(self, path: Path, framework: Literal["np", "pt"]) -> None:
        self._path, self._framework = path, framework

    def __enter__(self) -> "safe_open":
        try:
            self._file = safe_open(self._path, framework=self._framework)
            return self._file.__enter__()
        except FileNotFoundError as error:
            raise CheckpointError(f"{self._path}: no such file") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._path}: not a whole safetensors file: {error}") from error

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)


def _layout(directory: Path, names: Mapping[str, Path]) -> Layout:
    if any(name.startswith(DENOISER_PREFIX) for name in names):
        return Layout.TWO_TOWER
    if any(name.startswith(BASE_PREFIX) for name in names):
        return Layout.BASE
    raise CheckpointError(f"{directory}: no tensor starts with {DENOISER_PREFIX!r} or {BASE_PREFIX!r}")
