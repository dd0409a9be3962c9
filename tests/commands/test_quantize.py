"""`quantize`: what it writes, how it goes on after it was cut short, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import twotower.model.quantising as quantising
from tests.goldens import CPU, VENDORED
from tests.model.checkpoints import INDEX, config_of, tensors_of, write_sharded
from twotower.commands import main
from twotower.expert_formats import ExpertFormat
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower

SOURCE = VENDORED / "tt_moe"


def _run(source: Path | str, output: Path, *flags: str) -> int:
    return main(["quantize", str(source), "--device", "cpu", "--output", str(output), *flags])


def _states(checkpoint: Checkpoint) -> dict[str, Tensor]:
    context, denoiser = (load(checkpoint, CPU, torch.float32) for load in (load_context_tower, load_denoiser_tower))
    return {
        f"{kind}/{name}": t for kind, of in (("c", context), ("d", denoiser)) for name, t in of.state_dict().items()
    }


@pytest.mark.parametrize(
    ("flags", "form"),
    [(["--experts", "int8"], ExpertFormat(8)), (["--experts", "int4", "--group", "16"], ExpertFormat(4, 16))],
)
def test_the_same_as_at_load(flags: list[str], form: ExpertFormat, tmp_path: Path, capsys: Any) -> None:
    source = write_sharded(tmp_path / "source", tensors_of("tt_moe"), config_of("tt_moe") | {"auto_map": {"x": "y"}})
    for name in ("tokenizer.json", "expectation.json", "tuned.json", "modeling.py", "LICENSE"):
        (source / name).write_text("{}")
    output = tmp_path / "made"
    assert _run(source, output, *flags) == 0
    said = capsys.readouterr()
    assert f"matrices of experts in {form}" in said.out and "quantising: 100%" in said.err
    ours, theirs = Checkpoint.open(output), Checkpoint.open(source, form)
    assert ours.config == theirs.config and not ours.quantises and ours.vocabulary == theirs.vocabulary
    mine, wanted = _states(ours), _states(theirs)
    assert mine.keys() == wanted.keys() and all(torch.equal(mine[name], wanted[name]) for name in mine)
    assert {path.name for path in output.iterdir()} == {
        *(path.name for path in source.glob("*.safetensors")), INDEX, "config.json", "tokenizer.json", "LICENSE"
    }  # fmt: skip
    assert "auto_map" not in json.loads((output / "config.json").read_text())
    assert not (tmp_path / "made.part").exists()


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    source, output = write_sharded(tmp_path / "source", tensors_of("tt_moe"), config_of("tt_moe")), tmp_path / "made"
    whole, written = quantising._write_shard, []

    def cut(work: Any, shard: str, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        whole(work, shard, *rest)

    monkeypatch.setattr(quantising, "_write_shard", cut)
    assert _run(source, output, "--experts", "int8") == 130
    assert not output.exists() and len(list((tmp_path / "made.part").glob("*.safetensors"))) == 2
    again: list[str] = []
    monkeypatch.setattr(
        quantising, "_write_shard", lambda work, shard, *rest: (again.append(shard), whole(work, shard, *rest))
    )
    assert _run(source, output, "--experts", "int4", "--group", "16") == 2
    assert "of another run" in capsys.readouterr().err
    assert _run(source, output, "--experts", "int8") == 0
    assert len(again) == 1 and not set(again) & set(written)
    assert _states(Checkpoint.open(output)).keys()


@pytest.mark.parametrize(
    ("source", "flags", "words"),
    [
        ("nowhere", ["--experts", "int8"], "nowhere: no such directory"),
        (SOURCE, ["--experts", "int4"], "groups of 32 do not divide 16"),
        (SOURCE, ["--experts", "int4", "--group", "20"], "in groups of 16, 32, 64, 128"),
        (SOURCE, ["--experts", "int8", "--group", "16"], "only int4 has groups"),
        (VENDORED / "tt_dense", ["--experts", "int8"], "no layers with experts"),
    ],
)
def test_what_is_refused(source: Path | str, flags: list[str], words: str, tmp_path: Path, capsys: Any) -> None:
    assert _run(source, tmp_path / "made", *flags) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def _there(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output.mkdir()


def _no_parent(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(output.parent)


def _full(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantising.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))


@pytest.mark.parametrize(
    ("change", "words"),
    [(_there, "exists already"), (_no_parent, "no such directory as"), (_full, "got 0.00 GB free there, wanted")],
)
def test_outputs_that_are_refused(
    change: Callable[[Path, pytest.MonkeyPatch], None], words: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    output = tmp_path / "in" / "made"
    output.parent.mkdir()
    change(output, monkeypatch)
    assert _run(SOURCE, output, "--experts", "int8") == 2
    assert words in capsys.readouterr().err


def test_what_is_quantised_already_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert _run(SOURCE, tmp_path / "eight", "--experts", "int8") == 0
    for flags in (["--experts", "int8"], ["--experts", "int4", "--group", "16"]):
        assert _run(tmp_path / "eight", tmp_path / "made", *flags) == 2
        assert "already" in capsys.readouterr().err


@pytest.mark.slow
def test_generate_at_load_and_ahead_say_the_same(tmp_path: Path, capsys: Any) -> None:
    assert _run("demo", tmp_path / "demo-int4", "--experts", "int4", "--group", "16") == 0
    capsys.readouterr()
    asked = ["--prompt", "roman: 3376\n", "--max-new-tokens", "16"]
    assert main(["generate", "--checkpoint", str(tmp_path / "demo-int4"), *asked]) == 0
    ahead = capsys.readouterr().out
    at_load = ["--experts", "int4", "--expert-group", "16"]
    assert main(["generate", "--checkpoint", "demo", *asked, *at_load]) == 0
    assert capsys.readouterr().out == ahead and ahead.strip()
    assert main(["generate", "--checkpoint", "demo", *asked, "--experts", "int4"]) == 2
    assert "groups of 32 do not divide 48" in capsys.readouterr().err
