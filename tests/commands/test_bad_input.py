"""What `generate` refuses: one line, exit code 2, nothing decoded. And how a run that fails ends."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.running import GOOD, IDS_ONLY, Run, fake_pair
from tests.goldens import VENDORED
from tests.model.checkpoints import config_of, tensors_of, write
from twotower.commands import main
from twotower.errors import NumericalError, Unavailable


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--checkpoint"]),
        (["--checkpoint", IDS_ONLY], ["--prompt", "--input"]),
        ([*GOOD, "--prompt", "x"], ["--prompt", "not allowed with"]),
        ([*GOOD, "--no-such-flag"], ["--no-such-flag"]),
        ([*GOOD, "--max-new-token", "5"], ["--max-new-token"]),
        ([*GOOD, "--seed"], ["--seed", "expected one argument"]),
        ([*GOOD, "--temperature", "-inf"], ["--temperature", "expected one argument", "written --flag=VALUE"]),
        ([*GOOD, "--temperature=-inf"], ["temperature", "got -inf", "[0, 1000]"]),
        (["--checkpoint", IDS_ONLY, "--prompt-token-ids", "-5,6"], ["--prompt-token-ids", "written --flag=VALUE"]),
        (["--checkpoint", IDS_ONLY, "--prompt-token-ids=-5,6"], ["prompt_token_ids[0]", "got -5"]),
        (["--checkpoint", IDS_ONLY, "--prompt", "-hello"], ["--prompt", "written --flag=VALUE"]),
        ([*GOOD, "--max-new-tokens", "1_0"], ["max_new_tokens", "got '1_0'", "an integer"]),
        ([*GOOD, "--output", "x"], ["--input", "--output"]),
        (["--checkpoint", IDS_ONLY, "--input", "x"], ["--input", "--output"]),
        ([*GOOD, "--strict"], ["--strict", "--input"]),
        (["--checkpoint", IDS_ONLY, "--input", "x", "--output", "y", "--json"], ["--json", "--output"]),
        (["--checkpoint", "no/such/place", "--prompt", "x"], ["no/such/place", "no such directory"]),
        (["--checkpoint", str(VENDORED), "--prompt", "x"], ["config.json", "no such file"]),
        (["--checkpoint", IDS_ONLY, "--prompt", "x"], ["prompt", "no tokenizer", "token ids"]),
        ([*GOOD, "--stop", "x"], ["stop", "no tokenizer"]),
        (["--checkpoint", IDS_ONLY, "--prompt-token-ids", ""], ["prompt", "empty"]),
        (["--checkpoint", IDS_ONLY, "--prompt-token-ids", "5,128"], ["prompt_token_ids[1]", "128", "from 0 to 127"]),
        (["--checkpoint", IDS_ONLY, "--prompt-token-ids", "5,x"], ["prompt_token_ids[1]", "'x'"]),
        (["--checkpoint", IDS_ONLY, "--prompt-token-ids", "5,,6"], ["prompt_token_ids[1]", "''"]),
        ([*GOOD, "--mode", "fast"], ["mode", "'fast'", "diffusion, mock_ar, ar, verified, auto"]),
        ([*GOOD, "--mode", "7"], ["mode", "7", "diffusion, mock_ar, ar, verified, auto"]),
        ([*GOOD, "--max-new-tokens", "0"], ["max_new_tokens", "0", "from 1"]),
        ([*GOOD, "--max-new-tokens", "many"], ["max_new_tokens", "'many'", "an integer"]),
        ([*GOOD, "--max-new-tokens", "5.5"], ["max_new_tokens", "5.5", "an integer"]),
        ([*GOOD, "--max-new-tokens", "9" * 5000], ["max_new_tokens", "an integer"]),
        ([*GOOD, "--max-new-tokens", "4096"], ["max_new_tokens", "4098", "at most 4096"]),
        ([*GOOD, "--block-size", "0"], ["block_size", "0", "from 1 to"]),
        ([*GOOD, "--steps-per-block", "-1"], ["steps_per_block", "-1", "from 1 to"]),
        ([*GOOD, "--confidence-threshold", "1.1"], ["confidence_threshold", "1.1", "[0, 1]"]),
        ([*GOOD, "--temperature", "nan"], ["temperature", "nan", "[0, 1000]"]),
        ([*GOOD, "--temperature", "inf"], ["temperature", "inf", "[0, 1000]"]),
        ([*GOOD, "--min-tokens", "5"], ["min_tokens", "5", "diffusion"]),
        ([*GOOD, "--mode", "ar", "--top-p", "0"], ["top_p", "0", "(0, 1]"]),
        ([*GOOD, "--mode", "ar", "--block-size", "8"], ["block_size", "no meaning in ar"]),
        ([*GOOD, "--seed", "-1"], ["seed", "-1"]),
        ([*GOOD, "--stop-token-ids", "999"], ["stop_token_ids[0]", "999", "from 0 to 127"]),
        ([*GOOD, "--dtype", "float16"], ["dtype", "'float16'", "float32, bfloat16"]),
        ([*GOOD, "--device", "gpu"], ["device", "'gpu'", "cpu"]),
        ([*GOOD, "--device", "meta"], ["device", "'meta'", "cpu"]),
        ([*GOOD, "--device", "cuda:99999"], ["device", "cuda:99999", "CUDA devices"]),
    ],
)
def test_bad_input(arguments: list[str], words: list[str], run: Callable[..., Run]) -> None:
    done = run(*arguments)
    assert done.code == 2 and done.out == ""
    assert done.err.count("\n") == 1 and all(word in done.err for word in words), done.err
    assert "error: " in done.err


@pytest.mark.parametrize("prompt", ["", "caf\udce9"])
def test_bad_text(prompt: str, with_text: str, run: Callable[..., Run]) -> None:
    done = run("--checkpoint", with_text, "--prompt", prompt)
    assert done.code == 2 and done.err.count("\n") == 1 and "error: prompt: got" in done.err


def test_a_damaged_checkpoint(tmp_path: Path, run: Callable[..., Run]) -> None:
    tensors = tensors_of("tt_moe")
    del tensors["context_tower.norm_f.weight"]
    done = run("--checkpoint", str(write(tmp_path, tensors, config_of("tt_moe"))), "--prompt-token-ids", "5")
    assert done.code == 2 and done.err.count("\n") == 1 and "context_tower.norm_f.weight" in done.err


@pytest.mark.parametrize("error", [NumericalError("a NaN"), Unavailable("gone"), RuntimeError("line\nbreak")])
def test_a_failing_run(error: Exception, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]) -> None:
    fake_pair(monkeypatch, lambda request: error)
    done = run(*GOOD)
    assert done.code == 1 and done.err.count("\n") == 1 and "error: " in done.err


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]) -> None:
    fake_pair(monkeypatch, lambda request: KeyboardInterrupt())
    done = run(*GOOD)
    assert (done.code, done.err) == (130, "python -m twotower: error: interrupted\n")


def test_a_reader_that_has_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert main(["generate", *GOOD]) == 1
        print("what the interpreter still flushes at its end", flush=True)
