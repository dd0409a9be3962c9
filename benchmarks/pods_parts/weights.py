"""The demo with other weights: a checkpoint whose answers can be told from the demo's."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.reference.workload import DEMO

_FILE = "model.safetensors"
_NOISE = 0.1  # of each matrix, as a share of itself
_LEFT_OUT = ("expectation.json",)  # which names the demo's own tokens


def write_other_weights(directory: Path) -> Path:
    """The same layout, config and tokenizer. Returns the directory."""
    shutil.copytree(DEMO, directory, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    random = torch.Generator().manual_seed(0)
    weights = {
        name: _noisy(tensor, random) if tensor.is_floating_point() and tensor.ndim > 1 else tensor
        for name, tensor in load_file(directory / _FILE).items()
    }
    save_file(weights, directory / _FILE, metadata={"format": "pt"})
    return directory


def _noisy(tensor: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=random)
    return (tensor.float() * (1 + _NOISE * noise)).to(tensor.dtype)
