"""A finished training run as a checkpoint directory in the released layout. Weights are bf16, the small and sensitive
vectors fp32. With them come the tokenizer files, and a model card with the scores of exactly these files.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch

from twotower.config import ModelConfig
from twotower.core import Mode
from twotower.demo.card import examples, model_card
from twotower.demo.corpus import save_families
from twotower.demo.earlier import save_recipe
from twotower.demo.evaluate import evaluate_all, wrong_of
from twotower.demo.expect import write_expectation
from twotower.demo.objectives import FULL_MASK_SHARE, SUFFIX_SHARE
from twotower.demo.scores import AR, MOCK_AR, USUAL, Way
from twotower.demo.tokenizer import save_tokenizer
from twotower.demo.trainer import Trainer
from twotower.model.loading import save_checkpoint
from twotower.model.tower import DenoiserTower, Tower

_FULL_PRECISION = ("A_log", "D", "dt_bias", "gate.weight", "e_score_correction_bias")
AnyTower = TypeVar("AnyTower", bound=Tower)


def ship(trainer: Trainer, directory: Path, num_instances: int = 200) -> None:
    """Write the checkpoint, evaluate what was written, and put the scores on its card."""
    assert trainer.denoiser is not None, "the denoiser stage has not begun"
    directory.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.from_dict(trainer.recipe.config)
    denoiser = tempered(trainer.denoiser, trainer.recipe.confidence_temperature)
    save_checkpoint(directory, config, rounded(trainer.context), rounded(denoiser))
    save_tokenizer(trainer.tokenizer, directory)
    log = "".join(json.dumps(asdict(entry)) + "\n" for entry in trainer.history)
    (directory / "training_log.jsonl").write_text(log, encoding="utf-8")
    save_families(directory)
    save_recipe(directory, trainer.recipe)
    write_expectation(directory)
    scores = evaluate_all(directory, [AR, MOCK_AR, USUAL, Way(Mode.DIFFUSION, 0.95)], num_instances)
    missed = {way: wrong_of(directory, examples(), way) for way in (AR, USUAL)}
    card = model_card(trainer, scores, missed, FULL_MASK_SHARE, SUFFIX_SHARE)
    (directory / "README.md").write_text(card, encoding="utf-8")


def tempered(denoiser: DenoiserTower, temperature: float) -> DenoiserTower:
    """A copy whose logits are divided by `temperature`: every prediction stays, every confidence falls.

    Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", 2017), folded into the final norm. The
    usual threshold, γ 0.8, then asks for more certainty than the trained denoiser's own 0.8 was worth.
    """
    copied = copy.deepcopy(denoiser)
    copied.norm_f.weight.data /= temperature
    return copied


def rounded(tower: AnyTower) -> AnyTower:
    """A copy of the tower whose large weights are bf16."""
    copied = copy.deepcopy(tower)
    for name, parameter in copied.named_parameters():
        if not name.endswith(_FULL_PRECISION):
            parameter.data = parameter.data.to(torch.bfloat16)
    return copied
