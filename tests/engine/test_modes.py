"""Edges every mode must stand: one-token prompts, stops inside a block, lengths that are no multiple of it."""

from pathlib import Path

import pytest
import torch

from tests.engine.decode import Decoded, decode_all
from tests.goldens import CPU, vendored
from tests.model.checkpoints import config_of, tensors_of, write
from twotower.core import DecodingParams, FinishReason, Mode, Request, RequestId
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower

NAMES = pytest.mark.parametrize("name", ["tt_moe", "tt_dense"])
MODES = pytest.mark.parametrize("mode", list(Mode))


def _decode(name: str, prompt: list[int], params: DecodingParams) -> Decoded:
    model = vendored(name)
    [result] = decode_all(model.context, model.denoiser, [Request(RequestId("r"), tuple(prompt), params)])
    return result


@pytest.mark.parametrize("name", ["tt_dense", pytest.param("tt_moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_where_the_towers_are_equal_mock_ar_is_ar(name: str, temperature: float, tmp_path: Path) -> None:
    tensors = tensors_of(name)
    for key in [key for key in tensors if key.startswith("context_tower.")]:
        tensors[key.replace("context_tower.", "denoiser_tower.")] = tensors[key].clone()
    tensors["lm_head.weight"] = tensors["context_lm_head.weight"].clone()
    checkpoint = Checkpoint.open(write(tmp_path, tensors, config_of(name)))
    context = load_context_tower(checkpoint, CPU, torch.float32)
    denoiser = load_denoiser_tower(checkpoint, CPU, torch.float32)
    requests = [
        Request(
            RequestId(f"{mode} {len(prompt)}"),
            tuple(prompt),
            DecodingParams(mode=mode, max_new_tokens=24, temperature=temperature, seed=3, ignore_eos=True),
        )
        for mode in (Mode.AR, Mode.MOCK_AR)
        for prompt in ([7], [5, 9], list(range(5, 45)))
    ]
    results = decode_all(context, denoiser, requests)
    for ar, mock in zip(results[:3], results[3:], strict=True):
        assert mock.token_ids == ar.token_ids
        assert (ar.num_steps, mock.num_steps) == (0, 24)


def test_on_the_golden_weights_mock_ar_is_not_ar() -> None:
    params = [DecodingParams(mode=mode, max_new_tokens=24, ignore_eos=True) for mode in (Mode.AR, Mode.MOCK_AR)]
    ar, mock = (_decode("tt_moe", [5, 9], p) for p in params)
    assert ar.token_ids != mock.token_ids


@NAMES
@MODES
@pytest.mark.slow
def test_a_prompt_of_one_token(name: str, mode: Mode) -> None:
    whole = _decode(name, [9], DecodingParams(mode=mode, max_new_tokens=20, ignore_eos=True))
    assert len(whole.token_ids) == 20 and whole.finish_reason is FinishReason.LENGTH
    one = _decode(name, [9], DecodingParams(mode=mode, max_new_tokens=1, ignore_eos=True))
    assert one.token_ids == whole.token_ids[:1] and one.finish_reason is FinishReason.LENGTH


@NAMES
def test_a_length_that_is_no_multiple_of_the_block(name: str) -> None:
    """The last block is decoded whole, because its size changes its tokens, and then cut."""
    model, lengths = vendored(name), [1, 15, 16, 17, 33, 48]
    params = [DecodingParams(max_new_tokens=new, ignore_eos=True) for new in lengths]
    requests = [Request(RequestId(str(p.max_new_tokens)), (5, 6, 7), p) for p in params]
    *results, whole = decode_all(model.context, model.denoiser, requests)
    for new, result in zip(lengths, results, strict=False):
        assert result.token_ids == whole.token_ids[:new]
        assert result.num_blocks == -(-new // 16)


@pytest.mark.slow
@NAMES
@MODES
def test_a_stop_token_ends_the_answer_at_once(name: str, mode: Mode) -> None:
    whole = _decode(name, [5, 6, 7], DecodingParams(mode=mode, max_new_tokens=48, ignore_eos=True))
    # The token whose first appearance is latest: inside a block, with blocks before it.
    stop = max(set(whole.token_ids), key=whole.token_ids.index)
    at = whole.token_ids.index(stop)
    assert at > (16 if mode is Mode.DIFFUSION else 3)
    params = DecodingParams(mode=mode, max_new_tokens=48, stop_token_ids=(stop,), ignore_eos=True)
    result = _decode(name, [5, 6, 7], params)
    assert result.token_ids == whole.token_ids[: at + 1]
    assert result.finish_reason is FinishReason.STOP
    if mode in (Mode.VERIFIED, Mode.AUTO):
        assert at // 16 <= result.num_blocks <= at
    else:
        assert result.num_blocks == (at // 16 + 1 if mode is Mode.DIFFUSION else at + 1)


@MODES
@pytest.mark.slow
def test_eos_ends_the_answer_unless_it_is_ignored(mode: Mode, tmp_path: Path) -> None:
    whole = _decode("tt_moe", [5, 6, 7], DecodingParams(mode=mode, max_new_tokens=48, ignore_eos=True))
    eos = max(set(whole.token_ids), key=whole.token_ids.index)
    checkpoint = Checkpoint.open(write(tmp_path, tensors_of("tt_moe"), config_of("tt_moe") | {"eos_token_id": eos}))
    model = vendored("tt_moe")
    context = load_context_tower(checkpoint, CPU, model.context.dtype)
    denoiser = load_denoiser_tower(checkpoint, CPU, model.denoiser.dtype)
    requests = [
        Request(RequestId(str(ignore)), (5, 6, 7), DecodingParams(mode=mode, max_new_tokens=48, ignore_eos=ignore))
        for ignore in (True, False)
    ]
    ignoring, stopping = decode_all(context, denoiser, requests)
    assert ignoring.token_ids == whole.token_ids
    assert stopping.token_ids == whole.token_ids[: whole.token_ids.index(eos) + 1]
    assert stopping.finish_reason is FinishReason.STOP
