"""Finished checkpoints as the start of another run: the mean of their weights as they were before they were shipped.

If one tower was trained further from another, the mean of their weights keeps the knowledge of both. (Wortsman et al.,
"Robust fine-tuning of zero-shot models", 2022.) Shipping rounds the large weights to bf16, which stays. Shipping also
divides the denoiser's logits, which is undone here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from twotower.config import ModelConfig
from twotower.demo.recipe import Recipe
from twotower.errors import CheckpointError, ConfigError
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower

RECIPE_FILE = "recipe.json"  # beside a checkpoint's weights: how they were trained
# Of the only revision that was shipped without a RECIPE_FILE.
_FIRST_TEMPERATURE = 2.0


@dataclass(frozen=True)
class Earlier:
    """Both towers' state dicts in float32, and the sha256 of the files that they come from."""

    context: dict[str, Tensor]
    denoiser: dict[str, Tensor]
    sha256: tuple[str, ...]


def read_earlier(directories: Sequence[Path], config: ModelConfig) -> Earlier:
    """The mean of the weights of checkpoints that `ship` wrote; one that is named twice counts twice. Raises
    CheckpointError, and ConfigError for another shape."""
    read = [_read(directory, config) for directory in directories]
    return Earlier(
        _mean([one.context for one in read]),
        _mean([one.denoiser for one in read]),
        tuple(digest for one in read for digest in one.sha256),
    )


def _mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def _read(directory: Path, config: ModelConfig) -> Earlier:
    checkpoint = Checkpoint.open(directory)
    if checkpoint.config != config:
        raise ConfigError(f"--from: {directory} has another config.json than the recipe's")
    cpu = torch.device("cpu")
    context = load_context_tower(checkpoint, cpu, torch.float32, kernels="torch")
    denoiser = load_denoiser_tower(checkpoint, cpu, torch.float32, kernels="torch")
    denoiser.norm_f.weight.data *= _temperature(directory)
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    return Earlier(context.state_dict(), denoiser.state_dict(), (digest,))


def save_recipe(directory: Path, recipe: Recipe) -> None:
    """Leave the recipe beside the weights."""
    text = json.dumps(asdict(recipe), indent=1)
    (directory / RECIPE_FILE).write_text(text + "\n", encoding="utf-8")


def _temperature(directory: Path) -> float:
    path = directory / RECIPE_FILE
    if not path.exists():
        return _FIRST_TEMPERATURE
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["confidence_temperature"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no confidence_temperature: {error!r}") from error
