"""A run that goes on from a shipped checkpoint starts with that one's own predictions, and is resumed as any other."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as BpeTokenizer

from twotower.config import ModelConfig
from twotower.demo.__main__ import main
from twotower.demo.card import command
from twotower.demo.earlier import RECIPE_FILE, Earlier, read_earlier, save_recipe
from twotower.demo.initialise import new_context_tower, new_denoiser_tower
from twotower.demo.recipe import Recipe, StageRecipe, continued
from twotower.demo.ship import rounded, tempered
from twotower.demo.trainer import Trainer
from twotower.errors import CheckpointError, ConfigError
from twotower.model.loading import save_checkpoint
from twotower.model.tower import ContextTower, DenoiserTower

_NONE = StageRecipe(train_steps=0, batch_size=1)

Towers = tuple[ContextTower, DenoiserTower]


@pytest.fixture(scope="module")
def towers(tiny_config: dict[str, Any]) -> Towers:
    generator = torch.Generator().manual_seed(7)
    context = new_context_tower(ModelConfig.from_dict(tiny_config), generator)
    other = new_context_tower(ModelConfig.from_dict(tiny_config), generator)
    return context, new_denoiser_tower(other, generator)


@pytest.fixture
def shipped(towers: Towers, tiny_config: dict[str, Any], tmp_path: Path) -> Path:
    """The towers' weights as `ship` leaves them, without scores and card."""
    recipe = Recipe(config=tiny_config, confidence_temperature=1.6)
    context, denoiser = towers
    config = ModelConfig.from_dict(tiny_config)
    save_checkpoint(tmp_path / "shipped", config, rounded(context), rounded(tempered(denoiser, 1.6)))
    save_recipe(tmp_path / "shipped", recipe)
    return tmp_path / "shipped"


def _begun(config: dict[str, Any], tokenizer: BpeTokenizer, output: Path, earlier: Earlier | None) -> Trainer:
    return Trainer(Recipe(context=_NONE, denoiser=_NONE, config=config), tokenizer, output, earlier=earlier)


def _assert_near(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal but for the rounding to bf16."""
    assert set(got) == set(wanted)
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=2**-7, atol=0, msg=name)


@pytest.mark.slow
def test_both_towers_start_as_the_earlier_ones_before_they_were_shipped(
    towers: Towers, shipped: Path, tiny_config: dict[str, Any], tokenizer: BpeTokenizer, output: Path
) -> None:
    earlier = read_earlier([shipped], ModelConfig.from_dict(tiny_config))
    trainer = _begun(tiny_config, tokenizer, output, earlier)
    _assert_near(trainer.context.state_dict(), towers[0].state_dict())
    # Stopped in the context stage: the denoiser's start has to outlive the process.
    trainer.save()
    resumed = _begun(tiny_config, tokenizer, output, None)
    resumed.resume()
    resumed._advance_stage()
    assert resumed.denoiser is not None
    _assert_near(resumed.denoiser.state_dict(), towers[1].state_dict())


def test_the_temperature_undone_is_the_one_beside_the_weights(shipped: Path, tiny_config: dict[str, Any]) -> None:
    config, norms = ModelConfig.from_dict(tiny_config), []
    for temperature in (2.0, 3.0):
        save_recipe(shipped, Recipe(config=tiny_config, confidence_temperature=temperature))
        norms.append(read_earlier([shipped], config).denoiser["norm_f.weight"])
    torch.testing.assert_close(norms[1], 1.5 * norms[0])
    (shipped / RECIPE_FILE).unlink()
    assert torch.equal(read_earlier([shipped], config).denoiser["norm_f.weight"], norms[0])
    (shipped / RECIPE_FILE).write_text(json.dumps({"seed": 0}))
    with pytest.raises(CheckpointError, match=r"recipe\.json: no confidence_temperature"):
        read_earlier([shipped], config)


def test_several_checkpoints_give_the_mean_of_their_weights(
    towers: Towers, shipped: Path, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    config, other = ModelConfig.from_dict(tiny_config), tmp_path / "other"
    save_checkpoint(other, config, *(rounded(tower) for tower in towers))
    save_recipe(other, Recipe(config=tiny_config, confidence_temperature=1.0))
    one, two = read_earlier([shipped], config), read_earlier([other], config)
    both = read_earlier([shipped, other, other], config)
    assert both.sha256 == (*one.sha256, *two.sha256, *two.sha256)
    for name, weight in both.denoiser.items():
        torch.testing.assert_close(weight, (one.denoiser[name] + 2 * two.denoiser[name]) / 3)


def test_another_shape_is_refused(shipped: Path) -> None:
    with pytest.raises(ConfigError, match=r"has another config\.json than the recipe's"):
        read_earlier([shipped], ModelConfig.from_dict(continued().config))


def test_from_wants_a_checkpoint_and_no_resumed_run(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--output", str(output), "--from", str(output), "--resume"]) == 2
    assert "--from: a run that is resumed goes on from its own state" in capsys.readouterr().err
    assert main(["train", "--output", str(output), "--from", str(output)]) == 2
    assert str(output) in capsys.readouterr().err
    assert list(output.iterdir()) == []


def test_the_command_on_the_card_says_from_what(
    tiny_config: dict[str, Any], tokenizer: BpeTokenizer, output: Path
) -> None:
    fresh = Recipe(context=_NONE, denoiser=_NONE, config=tiny_config)
    digests = tuple(hashlib.sha256(weights).hexdigest() for weights in (b"one", b"other", b"other"))
    begun = replace(fresh, begun_from=digests)
    commands = [command(Trainer(recipe, tokenizer, output)) for recipe in (fresh, begun)]
    assert commands[0] == "python -m twotower.demo train --output DIR --seed 0 --train-steps 0 0"
    named = " ".join(f"EARLIER-{digest[:6]}" for digest in digests)
    assert commands[1] == f"python -m twotower.demo train --from {named} --output DIR --seed 0 --train-steps 0 0"
