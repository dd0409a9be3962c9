"""What is shipped loads and is scored through the path that serves; the command line shows it."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as BpeTokenizer

from twotower.demo.__main__ import main
from twotower.demo.families import FAMILIES
from twotower.demo.recipe import Recipe
from twotower.demo.scores import Way, from_json
from twotower.demo.ship import ship
from twotower.demo.trainer import Trainer


@pytest.mark.slow
def test_a_shipped_run_is_a_whole_checkpoint(
    tiny_recipe: Recipe,
    tokenizer: BpeTokenizer,
    output: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = 48  # so few steps of training teach nobody to stop
    monkeypatch.setattr(Way.params, "__defaults__", (most,))
    trainer = Trainer(tiny_recipe, tokenizer, output)
    trainer.run()
    ship(trainer, output / "checkpoint", num_instances=1)
    names = {path.name for path in (output / "checkpoint").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"README.md", "training_log.jsonl", "expectation.json"}
    assert "Quality kept by diffusion" in (output / "checkpoint" / "README.md").read_text()
    main(["--threads", "1", "evaluate", "--checkpoint", str(output / "checkpoint"), "--num-instances", "1", "--json"])
    scores = [from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert [(s.family, s.way) for s in scores] == [
        (family, way) for family in FAMILIES for way in ("ar", "mock_ar", "diffusion 0.8")
    ]
    for score in scores:
        [answer] = score.answers
        assert 1 <= answer.num_tokens <= most
        assert len(answer.block_steps) == (
            -(-answer.num_tokens // 16) if "diffusion" in score.way else answer.num_tokens
        )


def test_the_corpus_command_shows_instances(capsys: pytest.CaptureFixture[str]) -> None:
    main(["corpus", "--show", "2", "--family", "date"])
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [instance["family"] for instance in shown] == ["date", "date"]
