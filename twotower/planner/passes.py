"""The bytes and operations that one pass needs at least, by part.

Bytes that every implementation moves: each used weight once, states, keys and values, logits. Activations between
kernels (`handed on`) are counted separately, each tensor once written and once read; fused kernels need less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from twotower.config import ModelConfig
from twotower.planner.devices import Device
from twotower.planner.weights import Weights

_FP32, _BF16 = 4, 2
_UNPACKING = 4
"""Operations on a weight that is held in 8 or 4 bits: taken apart, converted, scaled, rounded."""
UNPACKED_FOR = 32
"""Rows of an expert that our kernel unpacks a weight for at once (`model/kernels/quantised_product.py`)."""


class Kind(Enum):
    """What a pass is for. `width` positions a row; `logits` of how many of them."""

    DENOISE = "denoiser step"
    COMMIT = "commit"
    VERIFY = "verify"
    STEP = "ar step"
    PREFILL = "prefill chunk"


@dataclass(frozen=True, slots=True)
class Batch:
    """`rows` sequences, each with `context` tokens behind it and `width` positions in this pass."""

    rows: int
    context: int
    width: int

    @property
    def positions(self) -> int:
        return self.rows * self.width


Touched = Callable[[Kind, Batch], float]
"""How many experts of a layer a pass touches."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes moved, and operations: `bf16` ones on tensor cores, `fp32` ones beside."""

    name: str
    bytes: float
    bf16: float = 0.0
    fp32: float = 0.0

    def seconds(self, device: Device, reached: float = 1.0) -> float:
        """The larger of the two: bytes at `reached` of the bandwidth, operations at the published rates."""
        return max(self.bytes / (device.bandwidth * reached), self.bf16 / device.bf16 + self.fp32 / device.fp32)


@dataclass(frozen=True, slots=True)
class Cost:
    """A pass, part by part."""

    parts: tuple[Part, ...]

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def operations(self) -> float:
        return sum(part.bf16 + part.fp32 for part in self.parts)

    def seconds(self, device: Device, reached: float = 1.0) -> float:
        """One part after the other."""
        return sum(part.seconds(device, reached) for part in self.parts)


def uniform(config: ModelConfig) -> Callable[[float], float]:
    """How many experts so many tokens touch if a router prefers none: the most that they touch on average."""
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    return lambda tokens: experts * (1 - (1 - chosen / experts) ** tokens)


def state_bytes(config: ModelConfig) -> int:
    """The state bytes of one sequence: SSM states in fp32, conv windows in bf16."""
    ssm = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * _FP32
    conv = config.conv_kernel * config.conv_channels * _BF16
    return len(config.layers_of("M")) * (ssm + conv)


def kv_bytes(config: ModelConfig) -> int:
    """Keys and values of one token in bf16."""
    return len(config.layers_of("*")) * 2 * config.num_key_value_heads * config.head_dim * _BF16


def cost(kind: Kind, config: ModelConfig, weights: Weights, batch: Batch, touched: Touched | None = None) -> Cost:
    """Of one pass. `weights` are those of the tower that makes it, in bf16 but for experts in `config.experts`."""
    moved = weights.without_logits if kind is Kind.COMMIT else weights.bytes
    experts = uniform(config)(batch.positions) if touched is None else touched(kind, batch)
    return Cost(
        (
            *_dense(config, moved, batch),
            _experts(config, weights, moved, batch, experts),
            _mamba_states(kind, config, batch),
            _keys_values(kind, config, batch),
            _head(kind, config, moved, batch),
            _handed_on(config, batch),
        )
    )


def _dense(config: ModelConfig, moved: dict[str, int], batch: Batch) -> list[Part]:
    """Weights that every position meets: two operations a number."""
    names = ("mamba", "attention", "router", "shared experts", "mlp", "norms", "time")
    parts = [Part(name, moved[name], moved[name] / _BF16 * 2 * batch.positions) for name in names if moved[name]]
    looked_up = min(moved["embeddings"], batch.positions * config.hidden_size * _BF16)
    return [Part("embeddings", looked_up), *parts]


def _experts(config: ModelConfig, weights: Weights, moved: dict[str, int], batch: Batch, touched: float) -> Part:
    layers = moved["experts"] / (weights.expert * config.n_routed_experts) if weights.expert else 0
    met = batch.positions * config.num_experts_per_tok
    numbers = layers * weights.expert_numbers
    times = math.ceil(met / touched / UNPACKED_FOR) if touched else 0
    unpacking = _UNPACKING * numbers * touched * times if config.experts is not None else 0
    return Part("experts", layers * weights.expert * touched, numbers * 2 * met, unpacking)


def _mamba_states(kind: Kind, config: ModelConfig, batch: Batch) -> Part:
    """A denoiser and a verifying pass only read them; the latter keeps what its scans read and settles later."""
    state = config.mamba_width * config.ssm_state_size
    layers, held = len(config.layers_of("M")), batch.rows * state_bytes(config)
    kept = layers * batch.positions * (2 * config.conv_channels + config.mamba_width) * _FP32
    moved = {Kind.DENOISE: held, Kind.VERIFY: 3 * held + 2 * kept}.get(kind, 2 * held)
    return Part("mamba states", moved, fp32=6 * layers * state * batch.positions)


def _keys_values(kind: Kind, config: ModelConfig, batch: Batch) -> Part:
    """All that is cached is read once a row; a causal pass writes its own."""
    read = batch.rows * batch.context * kv_bytes(config)
    written = 0 if kind is Kind.DENOISE else batch.positions * kv_bytes(config)
    seen = batch.context + (batch.width if kind is Kind.DENOISE else batch.width / 2)
    heads = config.num_attention_heads * config.head_dim
    return Part("keys and values", read + written, 4 * len(config.layers_of("*")) * heads * seen * batch.positions)


def _head(kind: Kind, config: ModelConfig, moved: dict[str, int], batch: Batch) -> Part:
    """A denoiser step needs logits of masked positions, half of a block on average; a prompt's last position's do."""
    share = {Kind.DENOISE: batch.positions / 2, Kind.VERIFY: batch.positions, Kind.COMMIT: 0}
    logits = share.get(kind, batch.rows)
    if not logits:
        return Part("head", 0)
    numbers = logits * config.vocab_size
    return Part("head", moved["head"] + 2 * numbers * _FP32, 2 * numbers * config.hidden_size)


def _handed_on(config: ModelConfig, batch: Batch) -> Part:
    """Between kernels, in bf16, each once written and once read: the residual stream and what layers are inside."""
    inner = {
        "M": config.mamba_width * 2 + config.conv_channels * 2 + config.mamba_num_heads,
        "*": (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim,
        "E": config.moe_shared_expert_intermediate_size
        + config.num_experts_per_tok * (config.moe_intermediate_size + 2 * config.hidden_size),
        "-": config.intermediate_size,
    }
    each = sum(inner[kind] + 2 * config.hidden_size for kind in config.hybrid_override_pattern)
    return Part("handed on", 2 * _BF16 * each * batch.positions)
