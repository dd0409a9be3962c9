"""The baseline is only a baseline if it computes the same thing: it gives the released code's tokens itself."""

from typing import Any

import pytest

from benchmarks.reference.naive_loop import NaiveLoop
from tests.goldens import MODELS, causal_request, diffusion_request, golden, prompt_ids, the_first_is_quick
from twotower.core import DecodingParams, Mode, Request, RequestId

PROMPTS = pytest.mark.parametrize(("name", "number"), the_first_is_quick(prompt_ids()))


def _loop(name: str) -> NaiveLoop:
    model = golden(name)
    return NaiveLoop(model.context, model.denoiser)


def _tokens(blocks: Any) -> list[int]:
    return [token for block in blocks for token in block.token_ids]


@PROMPTS
def test_diffusion_tokens_and_steps(name: str, number: int) -> None:
    prompt = golden(name).prompts[number]
    for case in prompt["cases"]:
        request = diffusion_request(prompt, case)
        if case["eos_token_id"] is not None:
            params = DecodingParams(
                max_new_tokens=4 * case["block_size"],
                block_size=case["block_size"],
                steps_per_block=case["steps_per_block"],
                confidence_threshold=case["confidence_threshold"],
                stop_token_ids=(case["eos_token_id"],),
                ignore_eos=True,
            )
            request = Request(request.id, request.prompt_token_ids, params)
        blocks = list(_loop(name).generate(request))
        assert _tokens(blocks) == case["output"], case["id"]
        assert sum(block.num_steps for block in blocks) == case["nfe"], case["id"]


@PROMPTS
@pytest.mark.parametrize("mode", [Mode.AR, Mode.MOCK_AR, Mode.VERIFIED])
def test_causal_modes(name: str, number: int, mode: Mode) -> None:
    prompt = golden(name).prompts[number]
    assert _tokens(_loop(name).generate(causal_request(prompt, mode))) == prompt[str(mode)]["tokens"]


@pytest.mark.parametrize("params", [DecodingParams(temperature=0.5), DecodingParams(max_new_tokens=20, block_size=16)])
def test_what_the_released_script_cannot_do_is_refused(params: DecodingParams) -> None:
    with pytest.raises(ValueError, match=r"temperature|max_new_tokens"):
        list(_loop(MODELS[0]).generate(Request(RequestId("r"), (5, 6), params)))


def test_a_prompt_of_one_token() -> None:
    request = Request(RequestId("r"), (5,), DecodingParams(mode=Mode.AR, max_new_tokens=3, ignore_eos=True))
    assert len(_tokens(_loop(MODELS[0]).generate(request))) == 3
