"""The golden vectors as the tests read them. `GOLDEN_DIR` points at another set of the same format.

Tests over all `MODELS` take that set; those that need a checkpoint of a certain shape take the vendored ones by name.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower.model.tower import ContextTower, DenoiserTower

VENDORED = Path(__file__).parent / "golden"
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", VENDORED))
CPU = torch.device("cpu")
MODELS = sorted(path.parent.name for path in GOLDEN_DIR.glob("*/vectors.json"))


@dataclass(frozen=True)
class Golden:
    """One checkpoint with its vectors and its loaded towers."""

    name: str
    checkpoint: Checkpoint
    context: ContextTower
    denoiser: DenoiserTower
    prompts: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]
    mask_token_id: int


def golden(name: str) -> Golden:
    """One of MODELS."""
    return _read(GOLDEN_DIR / name)


def vendored(name: str) -> Golden:
    """`tt_moe` or `tt_dense`, whatever GOLDEN_DIR says."""
    return _read(VENDORED / name)


@cache
def _read(directory: Path) -> Golden:
    name = directory.name
    checkpoint = Checkpoint.open(directory)
    vectors = _with_verified(directory / "vectors.json")
    return Golden(
        name,
        checkpoint,
        load_context_tower(checkpoint, CPU, torch.float32),
        load_denoiser_tower(checkpoint, CPU, torch.float32),
        vectors["prompts"],
        load_file(directory / "vectors.safetensors"),
        vectors["mask_token_id"],
    )


def prompt_ids(where: Callable[[dict[str, Any]], bool] = lambda prompt: True) -> list[tuple[str, int]]:
    """(model, prompt number) of every golden prompt of which `where` holds."""
    return [(name, i) for name in MODELS for i, prompt in enumerate(_vectors(name)["prompts"]) if where(prompt)]


def the_first_is_quick(prompts: list[tuple[str, int]]) -> list[Any]:
    """These prompts as a test's parameters: each model's first, and the others for the slow part."""
    return [pytest.param(name, i, marks=[pytest.mark.slow] if i else []) for name, i in prompts]


@cache
def _vectors(name: str) -> dict[str, Any]:
    return _with_verified(GOLDEN_DIR / name / "vectors.json")


def _with_verified(path: Path) -> dict[str, Any]:
    """The vectors, with runs for `verified` and `auto`, which the released code does not have: those of `ar`."""
    vectors: dict[str, Any] = json.loads(path.read_text())
    for prompt in vectors["prompts"]:
        prompt |= {str(mode): prompt[str(Mode.AR)] for mode in (Mode.VERIFIED, Mode.AUTO)}
    return vectors


def diffusion_request(prompt: dict[str, Any], case: dict[str, Any]) -> Request:
    """A golden diffusion case as a request. The reference returns whole blocks, past an EOS too."""
    params = DecodingParams(
        mode=Mode.DIFFUSION,
        max_new_tokens=len(case["output"]),
        block_size=case["block_size"],
        steps_per_block=case["steps_per_block"],
        confidence_threshold=case["confidence_threshold"],
        ignore_eos=True,
    )
    return Request(RequestId(case["id"]), tuple(prompt["tokens"]), params)


def causal_request(prompt: dict[str, Any], mode: Mode) -> Request:
    """A golden `ar`, `mock_ar`, `verified` or `auto` run as a request."""
    tokens = prompt[str(mode)]["tokens"]
    params = DecodingParams(mode=mode, max_new_tokens=len(tokens), ignore_eos=True)
    return Request(RequestId(f"{prompt['id']}.{mode}"), tuple(prompt["tokens"]), params)
