"""The numbers of the shipped checkpoint: its architecture and how it is trained. No code that trains lives here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from twotower.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID

BLOCK_SIZE = 16
Stage = Literal["context", "denoiser"]
STAGES: tuple[Stage, ...] = ("context", "denoiser")


def released_config(**changes: Any) -> dict[str, Any]:
    """The demo's config.json: the released model's fields and proportions, shortened and narrowed."""
    config: dict[str, Any] = {
        "architectures": ["NemotronHTwoTowerForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "MEMEM*EMEMEM*E",
        "vocab_size": 512,
        "hidden_size": 128,
        "layer_norm_epsilon": 1e-5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "ssm_state_size": 32,
        "conv_kernel": 4,
        "chunk_size": 64,
        "intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 96,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "mlp_hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    config |= changes
    return config | {"num_hidden_layers": len(config["hybrid_override_pattern"])}


@dataclass(frozen=True)
class StageRecipe:
    """One stage: Muon and Adam under one warm-up, stable, decay schedule."""

    train_steps: int
    batch_size: int
    muon_rate: float = 0.01
    adam_rate: float = 3e-3
    warmup_steps: int = 100
    decay_fraction: float = 0.4

    def rate_at(self, step: int) -> float:
        """The share of the learning rates at train step `step` (from 0): linear up, flat, linear down to nearly 0."""
        decay_steps = max(1, round(self.train_steps * self.decay_fraction))
        up = (step + 1) / max(1, self.warmup_steps)
        down = (self.train_steps - step) / decay_steps
        return min(1.0, up, down)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, the seed included.

    Every `mock_ar_every`-th train step of the denoiser adds a batch of mock-AR's own objective; 0: none does. The
    logits of the denoiser that is shipped are divided by `confidence_temperature`. `begun_from` holds the sha256 of
    the weights that the run goes on from the mean of, none where it begins with fresh ones.
    """

    seed: int = 0
    context: StageRecipe = field(default_factory=lambda: StageRecipe(train_steps=2500, batch_size=48))
    denoiser: StageRecipe = field(
        default_factory=lambda: StageRecipe(train_steps=11_000, batch_size=32, decay_fraction=0.65)
    )
    weight_decay: float = 0.05
    balance_rate: float = 1e-3
    mock_ar_every: int = 4
    confidence_temperature: float = 2.0
    begun_from: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=released_config)

    def stage(self, name: Stage) -> StageRecipe:
        """The recipe of one stage."""
        return self.context if name == "context" else self.denoiser


def continued() -> Recipe:
    """How finished checkpoints go on when families have been added: low rates and a long decay. What was known stays
    near, and the decay is where both towers become right.
    """
    return Recipe(
        context=StageRecipe(
            train_steps=300, batch_size=24, muon_rate=1e-3, adam_rate=4e-4, warmup_steps=20, decay_fraction=0.8
        ),
        denoiser=StageRecipe(
            train_steps=800, batch_size=24, muon_rate=1.5e-3, adam_rate=5e-4, warmup_steps=30, decay_fraction=0.8
        ),
        mock_ar_every=10,
    )
