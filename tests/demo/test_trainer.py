"""Both stages run, and a stopped and resumed run ends in the very weights of an uninterrupted one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as BpeTokenizer

from twotower.demo.__main__ import main
from twotower.demo.recipe import Recipe, StageRecipe
from twotower.demo.trainer import STATE_FILE, Trainer, saved_recipe
from twotower.errors import CheckpointError


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    assert trainer.denoiser is not None
    both = {"context": trainer.context, "denoiser": trainer.denoiser}
    return {f"{name}.{key}": value for name, tower in both.items() for key, value in tower.state_dict().items()}


@pytest.mark.parametrize("stop_after", [pytest.param(2, marks=pytest.mark.slow), 3, 4])
@pytest.mark.slow
def test_resumed_equals_uninterrupted(
    tiny_recipe: Recipe, tokenizer: BpeTokenizer, output: Path, tmp_path: Path, stop_after: int
) -> None:
    (tmp_path / "whole").mkdir()
    whole = Trainer(tiny_recipe, tokenizer, tmp_path / "whole")
    whole.run()
    Trainer(tiny_recipe, tokenizer, output).run(stop_after=stop_after)
    resumed = Trainer(tiny_recipe, tokenizer, output)
    resumed.resume()
    assert not resumed.finished
    resumed.run()
    assert resumed.finished
    for name, value in _weights(whole).items():
        assert torch.equal(value, _weights(resumed)[name]), name


def test_the_context_tower_is_frozen_in_the_second_stage(
    tiny_recipe: Recipe, tokenizer: BpeTokenizer, output: Path
) -> None:
    trainer = Trainer(tiny_recipe, tokenizer, output)
    trainer.run(stop_after=3)
    before = {name: value.clone() for name, value in trainer.context.state_dict().items()}
    trainer.run()
    assert trainer.denoiser is not None and trainer.finished
    assert all(torch.equal(value, before[name]) for name, value in trainer.context.state_dict().items())
    assert not torch.equal(trainer.denoiser.head.weight, trainer.context.head.weight)


def test_a_run_is_resumed_as_what_it_began_as(tiny_recipe: Recipe, tokenizer: BpeTokenizer, output: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        saved_recipe(output)
    Trainer(tiny_recipe, tokenizer, output).run(stop_after=1)
    assert saved_recipe(output) == tiny_recipe
    with pytest.raises(CheckpointError, match="cannot resume: seed was 0, now it is 1"):
        Trainer(replace(tiny_recipe, seed=1), tokenizer, output).resume()
    longer = replace(tiny_recipe, denoiser=replace(tiny_recipe.denoiser, train_steps=50))
    Trainer(longer, tokenizer, output).resume()


def test_a_run_is_not_begun_over_another(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (output / STATE_FILE).write_bytes(b"weights")
    assert main(["train", "--output", str(output)]) == 2
    assert "holds an earlier run; --resume continues it" in capsys.readouterr().err
    assert (output / STATE_FILE).read_bytes() == b"weights"
    assert list(output.iterdir()) == [output / STATE_FILE]


def test_the_schedule_warms_up_holds_and_decays() -> None:
    stage = StageRecipe(train_steps=100, batch_size=1, warmup_steps=10, decay_fraction=0.2)
    assert stage.rate_at(0) == pytest.approx(0.1)
    assert stage.rate_at(50) == 1.0
    assert stage.rate_at(90) == pytest.approx(0.5)
    assert 0 < stage.rate_at(99) <= 0.05
