"""The released decision loop fed with given logits and noise, without a model."""

import json
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.decoding.deciding import decide
from tests.goldens import GOLDEN_DIR
from twotower.decoding.unmasking import Blocks, StepParams

CASES: list[dict[str, Any]] = json.loads((GOLDEN_DIR / "sampler.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_sampler(case: dict[str, Any]) -> None:
    tensors = load_file(GOLDEN_DIR / "sampler.safetensors")
    logits, noise = tensors[f"{case['id']}.logits"], tensors.get(f"{case['id']}.uniform")
    assert (noise is not None) == (case["temperature"] > 0)
    mask = case["mask_token_id"]
    tokens, masked = [mask] * case["block_size"], [True] * case["block_size"]
    for step, theirs in enumerate(case["trace"]):
        assert tokens == theirs["xt"]
        left = max(case["steps_per_block"] - step, 1)
        params = [StepParams(case["confidence_threshold"], left, case["temperature"])]
        given = None if noise is None else noise[step : step + 1]
        [result] = decide(logits[step : step + 1], Blocks([tokens], [masked], params), mask, given)
        assert [place for place, now in enumerate(result.committed) if now] == theirs["committed"]
        for place, predicted in enumerate(theirs["predicted"]):
            if predicted is not None:
                assert result.predicted[place] == predicted
                assert result.confidence[place] == pytest.approx(theirs["confidence"][place], abs=2e-4)
        tokens, masked = result.tokens, [m and not now for m, now in zip(masked, result.committed, strict=True)]
    assert not any(masked)
    assert tokens == case["output"]
    assert len(case["trace"]) == case["nfe"]
