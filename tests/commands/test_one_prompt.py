"""`python -m twotower generate` with one prompt: what it prints."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.running import IDS_ONLY, RESULT, Run, fake_pair
from tests.goldens import vendored
from tests.model.checkpoints import base_tensors, config_of, tensors_of, write
from tests.text.tokenizers_for_tests import metaspace
from twotower.commands import main
from twotower.core import Mode


@pytest.mark.parametrize("mode", list(Mode))
def test_golden_tokens_as_json(mode: Mode, run: Callable[..., Run]) -> None:
    prompt = vendored("tt_moe").prompts[0]
    ids = ",".join(map(str, prompt["tokens"]))
    common = ["--checkpoint", IDS_ONLY, "--prompt-token-ids", ids, "--json", "--ignore-eos", "--seed", "5"]
    if mode is Mode.DIFFUSION:
        case = next(case for case in prompt["cases"] if case["eos_token_id"] is None)
        flags = ["--block-size", case["block_size"], "--steps-per-block", case["steps_per_block"]]
        flags += ["--confidence-threshold", case["confidence_threshold"], "--max-new-tokens", len(case["output"])]
        wanted, steps = case["output"], case["nfe"]
    else:
        wanted = prompt[str(mode)]["tokens"]
        flags, steps = ["--max-new-tokens", len(wanted)], None
    done = run(*common, "--mode", mode, *map(str, flags))
    assert done.code == 0 and done.err == ""
    result = done.result
    assert list(result) == RESULT
    assert result["token_ids"] == wanted and result["text"] is None
    assert steps is None or result["num_steps"] == steps
    assert (result["mode"], result["finish_reason"], result["seed"]) == (mode, "length", 5)
    assert result["seconds"] > 0


@pytest.mark.slow
def test_text_is_streamed_and_summed_up(with_text: str, run: Callable[..., Run]) -> None:
    common = ["--checkpoint", with_text, "--prompt", "the quick", "--max-new-tokens", "40", "--ignore-eos"]
    result = run(*common, "--json").result
    assert result["text"] and result["text"] == metaspace().decode(result["token_ids"])
    shown = run(*common)
    assert shown.out == result["text"] + "\n"
    assert shown.err.count("\n") == 1 and "40 tokens" in shown.err and "finished by length" in shown.err


def test_text_is_shown_as_blocks_are_committed(with_text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text="", **_: pieces.append(text))
    main(["generate", "--checkpoint", with_text, "--prompt", "the", "--max-new-tokens", "48", "--ignore-eos"])
    assert len([piece for piece in pieces[:-2] if piece]) == 3, "three blocks, three pieces"


def test_token_ids_are_shown_where_there_is_no_tokenizer(run: Callable[..., Run]) -> None:
    common = ["--checkpoint", IDS_ONLY, "--prompt-token-ids", "5,9", "--max-new-tokens", "20", "--ignore-eos"]
    wanted = run(*common, "--json").result["token_ids"]
    assert [int(token) for token in run(*common).out.split()] == wanted


@pytest.mark.slow
def test_stop_strings_and_stop_tokens(with_text: str, run: Callable[..., Run]) -> None:
    common = ["--checkpoint", with_text, "--prompt", "the quick", "--max-new-tokens", "40", "--ignore-eos", "--json"]
    whole = run(*common).result
    stop = whole["text"][9:12]
    result = run(*common, "--stop", stop, "--stop", "never said").result
    assert result["text"] == whole["text"][: whole["text"].index(stop)]
    assert result["finish_reason"] == "stop"
    kept = result["token_ids"]
    assert kept == whole["token_ids"][: len(kept)]
    assert stop in metaspace().decode(kept) and stop not in metaspace().decode(kept[:-1])
    token = whole["token_ids"][20]
    cut = run(*common, "--stop-token-ids", f"{token},127").result
    assert cut["token_ids"] == whole["token_ids"][: whole["token_ids"].index(token) + 1]


@pytest.mark.slow
def test_the_seed_is_drawn_reported_and_decides(run: Callable[..., Run]) -> None:
    # At temperature 1 this checkpoint gives several seeds one answer; at 20 hardly one token is likelier than others.
    common = ["--checkpoint", IDS_ONLY, "--prompt-token-ids", "5", "--temperature", "20", "--json"]
    common += ["--max-new-tokens", "24", "--ignore-eos"]
    first, other = run(*common).result, run(*common).result
    assert first["seed"] != other["seed"] and first["token_ids"] != other["token_ids"]
    assert run(*common, "--seed", str(first["seed"])).result["token_ids"] == first["token_ids"]


def test_bf16(run: Callable[..., Run]) -> None:
    done = run(
        "--checkpoint", IDS_ONLY, "--prompt-token-ids", "5", "--dtype", "bfloat16", "--max-new-tokens", "16", "--json"
    )
    assert done.code == 0 and done.result["token_ids"]


def test_a_base_checkpoint_decodes_ar_unasked(tmp_path: Path, run: Callable[..., Run]) -> None:
    base = str(write(tmp_path, base_tensors(tensors_of("tt_moe")), config_of("tt_moe")))
    common = ["--prompt-token-ids", "5,6", "--max-new-tokens", "9", "--json", "--ignore-eos"]
    done = run("--checkpoint", base, *common)
    assert done.result["mode"] == "ar"
    assert done.result["token_ids"] == run("--checkpoint", IDS_ONLY, "--mode", "ar", *common).result["token_ids"]
    refused = run("--checkpoint", base, *common, "--mode", "diffusion")
    assert refused.code == 2 and "wanted a mode this checkpoint can serve (ar)" in refused.err


def test_the_longest_sequence_is_ours_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]
) -> None:
    """The checkpoint's max_position_embeddings has no say: there are no position embeddings."""
    config = config_of("tt_moe") | {"max_position_embeddings": 8}
    common = ["--checkpoint", str(write(tmp_path, tensors_of("tt_moe"), config)), "--prompt-token-ids", "5,6"]
    opened = fake_pair(monkeypatch, lambda request: None)
    assert run(*common, "--max-new-tokens", "4094").code == 0
    assert run(*common, "--max-new-tokens", "9998", "--max-sequence-length", "10000").code == 0
    assert [settings.max_sequence_length for settings in opened] == [4096, 10000]
    for flags, words in (
        (["--max-new-tokens", "9", "--max-sequence-length", "10"], "wanted at most 10 together"),
        (["--max-sequence-length", "0"], "max_sequence_length: got 0, wanted an integer at least 2"),
        (["--max-sequence-length", "long"], "max_sequence_length: got 'long', wanted an integer"),
    ):
        done = run(*common, *flags)
        assert done.code == 2 and words in done.err
