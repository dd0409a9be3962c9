"""A run that goes on from a shipped checkpoint starts with that one's own predictions, and is resumed as any other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as BpeTokenizer

from twotower.config import ModelConfig
from twotower.demo.__main__ import main
from twotower.demo.earlier import RECIPE_FILE, Earlier, read_earlier, save_recipe
from twotower.demo.recipe import Recipe, StageRecipe, continued
from twotower.demo.ship import rounded, tempered
from twotower.demo.trainer import Trainer
from twotower.errors import CheckpointError, ConfigError
from twotower.model.loading import save_checkpoint

_STEP = StageRecipe(train_steps=1, batch_size=2, warmup_steps=1)


def _shipped(recipe: Recipe, tokenizer: BpeTokenizer, directory: Path) -> Trainer:
    """A trained run whose weights lie in `directory`, without scores and card."""
    directory.mkdir()
    trainer = Trainer(replace(recipe, context=_STEP, denoiser=_STEP), tokenizer, directory)
    trainer.run()
    assert trainer.denoiser is not None
    denoiser = tempered(trainer.denoiser, recipe.confidence_temperature)
    config = ModelConfig.from_dict(recipe.config)
    save_checkpoint(directory, config, rounded(trainer.context), rounded(denoiser))
    save_recipe(directory, recipe)
    return trainer


def _begun(recipe: Recipe, tokenizer: BpeTokenizer, output: Path, earlier: Earlier | None) -> Trainer:
    return Trainer(replace(recipe, context=_STEP, denoiser=_STEP), tokenizer, output, earlier=earlier)


def test_both_towers_start_as_the_earlier_ones_did_before_they_were_shipped(
    tiny_recipe: Recipe, tokenizer: BpeTokenizer, output: Path, tmp_path: Path
) -> None:
    recipe = replace(tiny_recipe, confidence_temperature=1.6)
    trained = _shipped(recipe, tokenizer, tmp_path / "shipped")
    earlier = read_earlier(tmp_path / "shipped", ModelConfig.from_dict(recipe.config))
    trainer = _begun(recipe, tokenizer, output, earlier)
    for name, weight in trained.context.state_dict().items():
        torch.testing.assert_close(trainer.context.state_dict()[name], weight, rtol=2**-8, atol=0)
    # Stopped in the context stage: the denoiser's start has to outlive the process.
    trainer.run(stop_after=1)
    resumed = _begun(recipe, tokenizer, output, None)
    resumed.resume()
    resumed._advance_stage()
    assert trained.denoiser is not None and resumed.denoiser is not None
    for name, weight in trained.denoiser.state_dict().items():
        torch.testing.assert_close(resumed.denoiser.state_dict()[name], weight, rtol=2**-7, atol=0)


def test_the_temperature_is_the_one_beside_the_weights(
    tiny_recipe: Recipe, tokenizer: BpeTokenizer, tmp_path: Path
) -> None:
    _shipped(tiny_recipe, tokenizer, tmp_path / "shipped")
    config = ModelConfig.from_dict(tiny_recipe.config)
    norms = []
    for temperature in (2.0, 3.0):
        save_recipe(tmp_path / "shipped", replace(tiny_recipe, confidence_temperature=temperature))
        norms.append(read_earlier(tmp_path / "shipped", config).denoiser["norm_f.weight"])
    torch.testing.assert_close(norms[1], 1.5 * norms[0])
    (tmp_path / "shipped" / RECIPE_FILE).unlink()
    assert torch.equal(read_earlier(tmp_path / "shipped", config).denoiser["norm_f.weight"], norms[0])
    (tmp_path / "shipped" / RECIPE_FILE).write_text(json.dumps({"seed": 0}))
    with pytest.raises(CheckpointError, match=r"recipe\.json: no confidence_temperature"):
        read_earlier(tmp_path / "shipped", config)


def test_another_shape_is_refused(tiny_recipe: Recipe, tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    _shipped(tiny_recipe, tokenizer, tmp_path / "shipped")
    with pytest.raises(ConfigError, match=r"has another config\.json than the recipe's"):
        read_earlier(tmp_path / "shipped", ModelConfig.from_dict(continued().config))


def test_from_wants_a_checkpoint_and_no_resumed_run(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--output", str(output), "--from", str(output), "--resume"]) == 2
    assert "--from: a run that is resumed goes on from its own state" in capsys.readouterr().err
    assert main(["train", "--output", str(output), "--from", str(output)]) == 2
    assert str(output) in capsys.readouterr().err
    assert list(output.iterdir()) == []
