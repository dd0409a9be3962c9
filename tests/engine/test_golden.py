"""Whole requests through the engines give the tokens, steps and decisions of NVIDIA's released code."""

from typing import Any

import pytest

from tests.engine.decode import decode_all
from tests.goldens import causal_request, diffusion_request, golden, prompt_ids, the_first_is_quick
from twotower.core import DecodingParams, FinishReason, Mode, Request, RequestId
from twotower.engine.modes.block_steps import StepTrace

PROMPTS = pytest.mark.parametrize(("name", "number"), the_first_is_quick(prompt_ids()))


def _cases(prompt: dict[str, Any]) -> list[dict[str, Any]]:
    return [case for case in prompt["cases"] if case["eos_token_id"] is None]


@PROMPTS
def test_diffusion_tokens_steps_and_traces(name: str, number: int) -> None:
    model = golden(name)
    prompt = model.prompts[number]
    cases = _cases(prompt)
    assert cases and model.mask_token_id == 3
    traces: list[StepTrace] = []
    requests = [diffusion_request(prompt, case) for case in cases]
    results = decode_all(model.context, model.denoiser, requests, together=False, traces=traces)
    for case, result in zip(cases, results, strict=True):
        assert result.token_ids == case["output"], case["id"]
        assert result.num_steps == case["nfe"], case["id"]
        _same_trace(case, [step for step in traces if step.request_id == case["id"]])


def _same_trace(case: dict[str, Any], steps: list[StepTrace]) -> None:
    assert len(steps) == len(case["trace"]) > 0
    for ours, theirs in zip(steps, case["trace"], strict=True):
        where = f"{case['id']} block {ours.block} step {ours.step}"
        assert (ours.block, ours.step) == (theirs["block"], theirs["step"]), where
        assert ours.t == pytest.approx(theirs["t"], abs=1e-6), where
        assert list(ours.tokens) == theirs["xt"], where
        assert list(ours.committed) == theirs["committed"], where
        masked = [i for i, token in enumerate(theirs["confidence"]) if token is not None]
        assert len(masked) == theirs["n_masked"], where
        assert sum(ours.confidence[i] > case["confidence_threshold"] for i in masked) == theirs["n_above"], where
        assert [ours.predicted[i] for i in masked] == [theirs["predicted"][i] for i in masked], where
        wanted = [theirs["confidence"][i] for i in masked]
        assert [ours.confidence[i] for i in masked] == pytest.approx(wanted, abs=2e-4), where


@PROMPTS
@pytest.mark.parametrize("mode", [Mode.AR, Mode.MOCK_AR])
def test_causal_modes(name: str, number: int, mode: Mode) -> None:
    model = golden(name)
    prompt = model.prompts[number]
    [result] = decode_all(model.context, model.denoiser, [causal_request(prompt, mode)])
    assert result.token_ids == prompt[str(mode)]["tokens"]
    assert result.num_steps == (0 if mode is Mode.AR else len(result.token_ids))
    assert result.finish_reason is FinishReason.LENGTH


@PROMPTS
def test_every_mode_and_case_of_a_prompt_in_one_batch(name: str, number: int) -> None:
    model = golden(name)
    prompt = model.prompts[number]
    cases = _cases(prompt)
    requests = [diffusion_request(prompt, case) for case in cases]
    causal = (Mode.AR, Mode.MOCK_AR, Mode.VERIFIED, Mode.AUTO)
    requests += [causal_request(prompt, mode) for mode in causal]
    wanted = [case["output"] for case in cases] + [prompt[str(mode)]["tokens"] for mode in causal]
    results = decode_all(model.context, model.denoiser, requests)
    assert [result.token_ids for result in results] == wanted


def _with_an_eos(run: str) -> Any:
    """The prompts that have a run with an EOS: of `diffusion` among their cases, or of a causal mode."""

    def has_one(prompt: dict[str, Any]) -> bool:
        if run == "diffusion":
            return any(case["eos_token_id"] is not None for case in prompt["cases"])
        return "eos" in prompt[run]

    found = prompt_ids(has_one)
    assert found, run
    return pytest.mark.parametrize(("name", "number"), found)


@_with_an_eos("diffusion")
def test_diffusion_stops_and_cuts_at_an_eos(name: str, number: int) -> None:
    """The released code returns the whole block, we cut after the EOS."""
    model = golden(name)
    prompt = model.prompts[number]
    for case in prompt["cases"]:
        if case["eos_token_id"] is None:
            continue
        params = DecodingParams(
            max_new_tokens=64,
            block_size=case["block_size"],
            steps_per_block=case["steps_per_block"],
            confidence_threshold=case["confidence_threshold"],
            stop_token_ids=(case["eos_token_id"],),
            ignore_eos=True,
        )
        request = Request(RequestId(case["id"]), tuple(prompt["tokens"]), params)
        [result] = decode_all(model.context, model.denoiser, [request])
        assert result.token_ids == case["output_truncated_at_eos"]
        assert result.finish_reason is FinishReason.STOP


def _stops_at_an_eos(name: str, number: int, mode: Mode) -> None:
    model = golden(name)
    prompt = model.prompts[number]
    eos = prompt[str(mode)]["eos"]
    params = DecodingParams(mode=mode, max_new_tokens=32, stop_token_ids=(eos["eos_token_id"],), ignore_eos=True)
    request = Request(RequestId("eos"), tuple(prompt["tokens"]), params)
    [result] = decode_all(model.context, model.denoiser, [request])
    assert result.token_ids == eos["tokens"]
    assert result.finish_reason is FinishReason.STOP


@_with_an_eos("ar")
def test_ar_stops_at_an_eos(name: str, number: int) -> None:
    _stops_at_an_eos(name, number, Mode.AR)


@_with_an_eos("mock_ar")
def test_mock_ar_stops_at_an_eos(name: str, number: int) -> None:
    _stops_at_an_eos(name, number, Mode.MOCK_AR)
