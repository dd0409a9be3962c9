"""A demo small enough to train in a test."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as BpeTokenizer

from twotower.demo.recipe import Recipe, StageRecipe, released_config
from twotower.demo.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> BpeTokenizer:
    return train_tokenizer(vocab_size=320, num_instances=2000)


@pytest.fixture(scope="session")
def tiny_config() -> dict[str, Any]:
    return released_config(
        hybrid_override_pattern="MEM*E",
        vocab_size=320,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    )


@pytest.fixture
def tiny_recipe(tiny_config: dict[str, Any]) -> Recipe:
    stage = StageRecipe(train_steps=3, batch_size=6, warmup_steps=1)
    return Recipe(context=stage, denoiser=stage, config=tiny_config)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"
