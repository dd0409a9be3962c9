"""The architecture of a checkpoint, read from its config.json."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from twotower.errors import CheckpointError
from twotower.expert_formats import GROUPS, ExpertFormat

LAYER_KINDS = {"M": "Mamba-2", "*": "attention", "E": "mixture of experts", "-": "MLP"}
_LAYER_WORDS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}
_ALIASES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_limit": "time_step_limit",
}
_MOST_TOKENS = 1 << 24  # ids beyond are not exact in fp32, in which engines read what was decided
_SIZES = (
    "vocab_size hidden_size head_dim mamba_head_dim ssm_state_size conv_kernel chunk_size intermediate_size "
    "moe_intermediate_size moe_shared_expert_intermediate_size max_position_embeddings"
).split()
MASK_TOKEN_ID = 3
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DENSE_52 = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Architecture fields that change inference, under the names of the released config.json.

    Defaults are the released class's. Fields the released code ignores (RoPE, sliding window, …) are ignored here.
    """

    hybrid_override_pattern: str = _DENSE_52
    vocab_size: int = 131072
    hidden_size: int = 4096
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    attention_bias: bool = False
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    n_groups: int = 8
    ssm_state_size: int = 128
    conv_kernel: int = 4
    use_conv_bias: bool = True
    use_bias: bool = False
    chunk_size: int = 128
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    mamba_hidden_act: str = "silu"
    intermediate_size: int = 21504
    mlp_bias: bool = False
    mlp_hidden_act: str = "relu2"
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 7688
    moe_shared_expert_intermediate_size: int = 7688
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    max_position_embeddings: int = 4096
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    experts: ExpertFormat | None = None
    """How routed experts' weights are held, from `quantization_config`; None: in the tower's dtype."""

    @property
    def num_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    @property
    def mamba_width(self) -> int:
        """d_inner: channels of a Mamba mixer. The config's `expand` plays no part."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels that pass the causal convolution: x, B and C."""
        return self.mamba_width + 2 * self.n_groups * self.ssm_state_size

    def with_experts(self, experts: ExpertFormat | None) -> Self:
        """The same architecture with experts in another format. Raises CheckpointError if the format does not fit."""
        config = replace(self, experts=experts)
        config._check_experts()
        return config

    def layers_of(self, kind: str) -> list[int]:
        return [i for i, k in enumerate(self.hybrid_override_pattern) if k == kind]

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read `config.json`, which need not be strict JSON: a bare Infinity is allowed. Raises CheckpointError."""
        path = directory / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such file; a checkpoint directory holds a config.json") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: got a {type(values).__name__}, wanted a JSON object")
        try:
            return cls.from_dict(values)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        known = {f.name: f for f in fields(cls)}
        # If both spellings exist, the released class's own one wins.
        given = {_ALIASES[key]: value for key, value in values.items() if key in _ALIASES and value is not None}
        given |= {key: value for key, value in values.items() if value is not None}
        chosen = {name: given[name] for name in known if name in given and name != "experts"}
        if "layers_block_type" in given and "hybrid_override_pattern" not in chosen:
            chosen["hybrid_override_pattern"] = _pattern_of_words(given["layers_block_type"])
        if "time_step_limit" in chosen:
            chosen["time_step_limit"] = _limits(chosen["time_step_limit"])
        for name, value in chosen.items():
            _check_type(name, value, known[name].type)
        chosen["experts"] = ExpertFormat.of_config(given.get("quantization_config"))
        config = cls(**chosen)
        config._check(given.get("num_hidden_layers"))
        config._check_tokens({**{name: getattr(config, name) for name in _TOKENS}, **given})
        return config

    def _check(self, num_hidden_layers: int | None) -> None:
        unknown = sorted(set(self.hybrid_override_pattern) - set(LAYER_KINDS))
        if unknown:
            raise CheckpointError(f"hybrid_override_pattern: unknown layer kinds {unknown}, wanted {list(LAYER_KINDS)}")
        if not self.hybrid_override_pattern:
            raise CheckpointError("hybrid_override_pattern: got no layers, wanted at least one")
        if num_hidden_layers is not None and num_hidden_layers != self.num_layers:
            raise CheckpointError(
                f"num_hidden_layers: got {num_hidden_layers}, but the pattern has {self.num_layers} layers"
            )
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if self.vocab_size > _MOST_TOKENS:
            raise CheckpointError(f"vocab_size: got {self.vocab_size}, wanted at most {_MOST_TOKENS}")
        if self.mamba_hidden_act not in ("silu", "swish"):
            raise CheckpointError(f"mamba_hidden_act: got {self.mamba_hidden_act!r}, wanted 'silu'")
        if "*" in self.hybrid_override_pattern:
            self._check_divides("num_attention_heads", "num_key_value_heads")
        if "M" in self.hybrid_override_pattern:
            self._check_divides("mamba_num_heads", "n_groups")
        if "E" in self.hybrid_override_pattern:
            self._check_divides("n_routed_experts", "n_group")
            if not 0 < self.num_experts_per_tok <= self.n_routed_experts:
                raise CheckpointError(
                    f"num_experts_per_tok: got {self.num_experts_per_tok}, wanted 1 to {self.n_routed_experts}"
                )
            if not 0 < self.topk_group <= self.n_group:
                raise CheckpointError(f"topk_group: got {self.topk_group}, wanted 1 to {self.n_group}")
        self._check_experts()

    def _check_experts(self) -> None:
        if self.experts is None:
            return
        if not self.layers_of("E"):
            raise CheckpointError(f"experts: got {self.experts}, but the pattern has no layers with experts")
        for name in ("hidden_size", "moe_intermediate_size"):
            if (misfit := self.experts.misfit(getattr(self, name))) is not None:
                both = math.gcd(self.hidden_size, self.moe_intermediate_size)
                fitting = [group for group in GROUPS if both % group == 0]
                wanted = f"int4 in groups of {' or '.join(map(str, fitting))}, or int8" if fitting else "int8"
                raise CheckpointError(f"experts: got {self.experts}, but {misfit} ({name}); wanted {wanted}")

    def _check_tokens(self, given: Mapping[str, Any]) -> None:
        """An end-of-sequence id outside the vocabulary would never be generated."""
        for name in _TOKENS:
            token = given.get(name, 0)
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise CheckpointError(f"{name}: got {token!r}, wanted a token id from 0 to {self.vocab_size - 1}")
        mask = given.get("mask_token_id", MASK_TOKEN_ID)
        if mask != MASK_TOKEN_ID:
            raise CheckpointError(
                f"mask_token_id: got {mask!r}, wanted {MASK_TOKEN_ID}, which every denoiser is trained with"
            )

    def _check_divides(self, many: str, few: str) -> None:
        whole, part = getattr(self, many), getattr(self, few)
        if part < 1 or whole < 1 or whole % part:
            raise CheckpointError(f"{many}: got {whole}, wanted a positive multiple of {few} ({part})")


def _pattern_of_words(words: object) -> str:
    if not isinstance(words, list):
        raise CheckpointError(f"layers_block_type: got a {type(words).__name__}, wanted a list of layer kinds")
    unknown = sorted({str(word) for word in words} - set(_LAYER_WORDS))
    if unknown:
        raise CheckpointError(f"layers_block_type: unknown layer kinds {unknown}, wanted {sorted(_LAYER_WORDS)}")
    return "".join(_LAYER_WORDS[word] for word in words)


def _limits(value: object) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise CheckpointError(f"time_step_limit: got {value!r}, wanted two numbers")
    return _number(value[0]), _number(value[1])


def _number(value: object) -> float:
    """A float, or transformers 5's spelling of one that JSON lacks: {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        value = value.get("__float__")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"time_step_limit: got {value!r}, wanted two numbers") from error


def _check_type(name: str, value: object, wanted: object) -> None:
    kinds: dict[object, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
    allowed = kinds.get(wanted)
    if allowed is None:
        return
    if not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool):
        raise CheckpointError(f"{name}: got {value!r}, wanted {'/'.join(k.__name__ for k in allowed)}")
