"""Both stages run, and a stopped and resumed run ends in the very weights of an uninterrupted one."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as BpeTokenizer

from twotower.demo.recipe import Recipe, StageRecipe
from twotower.demo.trainer import Trainer


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    assert trainer.denoiser is not None
    both = {"context": trainer.context, "denoiser": trainer.denoiser}
    return {f"{name}.{key}": value for name, tower in both.items() for key, value in tower.state_dict().items()}


@pytest.mark.parametrize("stop_after", [2, 3, 4])
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


def test_the_schedule_warms_up_holds_and_decays() -> None:
    stage = StageRecipe(train_steps=100, batch_size=1, warmup_steps=10, decay_fraction=0.2)
    assert stage.rate_at(0) == pytest.approx(0.1)
    assert stage.rate_at(50) == 1.0
    assert stage.rate_at(90) == pytest.approx(0.5)
    assert 0 < stage.rate_at(99) <= 0.05
