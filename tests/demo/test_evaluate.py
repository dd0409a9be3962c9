"""What is shipped loads and is scored through the path that serves; the command line shows it."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as BpeTokenizer

from twotower.demo.__main__ import main
from twotower.demo.evaluate import Score, table
from twotower.demo.families import FAMILIES
from twotower.demo.recipe import Recipe
from twotower.demo.ship import ship
from twotower.demo.trainer import Trainer


def test_the_table_has_a_row_per_family_and_their_mean() -> None:
    scores = [Score(family, way, 4, 3, 40, 10) for family in FAMILIES for way in ("ar", "diffusion 0.8")]
    rows = table(scores).splitlines()
    assert len(rows) == 2 + len(FAMILIES) + 1
    assert rows[-1] == "| mean | 75.0 % | 4.00 | 75.0 % | 4.00 |"


def test_a_shipped_run_is_a_whole_checkpoint(
    tiny_recipe: Recipe, tokenizer: BpeTokenizer, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(tiny_recipe, tokenizer, output)
    trainer.run()
    ship(trainer, output / "checkpoint", num_instances=2)
    names = {path.name for path in (output / "checkpoint").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"README.md", "training_log.jsonl"}
    main(["--threads", "1", "evaluate", "--checkpoint", str(output / "checkpoint"), "--num-instances", "1", "--json"])
    scores = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(s["family"], s["decoding"]) for s in scores[:2]] == [("words", "ar"), ("words", "diffusion 0.8")]


def test_the_corpus_command_shows_instances(capsys: pytest.CaptureFixture[str]) -> None:
    main(["corpus", "--show", "2", "--family", "date"])
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [instance["family"] for instance in shown] == ["date", "date"]
