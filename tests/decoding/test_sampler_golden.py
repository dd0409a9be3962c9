"""The released decision loop fed with given logits and noise, without a model."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.goldens import GOLDEN_DIR
from twotower.decoding.unmasking import StepParams, unmask

CASES: list[dict[str, Any]] = json.loads((GOLDEN_DIR / "sampler.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_sampler(case: dict[str, Any]) -> None:
    tensors = load_file(GOLDEN_DIR / "sampler.safetensors")
    logits, noise = tensors[f"{case['id']}.logits"], tensors.get(f"{case['id']}.uniform")
    assert (noise is not None) == (case["temperature"] > 0)
    mask = case["mask_token_id"]
    tokens = torch.full((1, case["block_size"]), mask)
    masked = torch.ones(1, case["block_size"], dtype=torch.bool)
    for step, theirs in enumerate(case["trace"]):
        assert tokens[0].tolist() == theirs["xt"]
        left = max(case["steps_per_block"] - step, 1)
        params = [StepParams(case["confidence_threshold"], left, case["temperature"])]
        given = None if noise is None else noise[step : step + 1]
        result = unmask(logits[step : step + 1], tokens, masked, params, mask, given)
        assert result.committed_RL[0].nonzero().flatten().tolist() == theirs["committed"]
        for place, predicted in enumerate(theirs["predicted"]):
            if predicted is not None:
                assert result.predicted_RL[0, place].item() == predicted
                assert result.confidence_RL[0, place].item() == pytest.approx(theirs["confidence"][place], abs=2e-4)
        tokens, masked = result.tokens_RL, masked & ~result.committed_RL
    assert not masked.any()
    assert tokens[0].tolist() == case["output"]
    assert len(case["trace"]) == case["nfe"]
