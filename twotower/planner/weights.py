"""How many bytes of weights each part of a tower has: counted on the towers themselves, on the meta device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from twotower.config import ModelConfig
from twotower.model.loading import materialise
from twotower.model.tower import ContextTower, DenoiserTower

_META = torch.device("meta")
_OF_MIXER = {"M": "mamba", "*": "attention", "-": "mlp"}
PARTS = ("embeddings", "mamba", "attention", "router", "experts", "shared experts", "mlp", "time", "norms", "head")


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes by part. `without_logits`: what a pass for states alone reads of each, for it ends at the last state."""

    bytes: dict[str, int]
    without_logits: dict[str, int]
    expert: int
    """Bytes of one routed expert of one layer."""
    expert_numbers: int
    """Weights of it, whatever they are held in."""

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def weights_of(kind: type[ContextTower] | type[DenoiserTower], config: ModelConfig, dtype: torch.dtype) -> Weights:
    """A tower's, as it would be loaded in `dtype`."""
    with _META:
        tower = kind(config)
    materialise(tower, _META, dtype)
    whole: Counter[str] = Counter({part: 0 for part in PARTS})
    spared: Counter[str] = Counter()
    for name, tensor in (*tower.named_parameters(), *tower.named_buffers()):
        part = _part(config, name)
        whole[part] += tensor.nbytes
        if not _before_the_last_state(config, name):
            spared[part] += tensor.nbytes
    layers = len(config.layers_of("E"))
    expert = whole["experts"] // (layers * config.n_routed_experts) if layers else 0
    numbers = 2 * config.hidden_size * config.moe_intermediate_size
    return Weights(dict(whole), {part: whole[part] - spared[part] for part in PARTS}, expert, numbers)


def _part(config: ModelConfig, name: str) -> str:
    if not name.startswith("layers."):
        outside = {"embeddings": "embeddings", "head": "head", "norm_f": "norms"}
        return outside.get(name.split(".")[0], "time")
    _, index, module, *inner = name.split(".")
    if module == "norm":
        return "norms"
    kind = config.hybrid_override_pattern[int(index)]
    if kind != "E":
        return _OF_MIXER[kind]
    return {"gate": "router", "experts": "experts", "shared_experts": "shared experts"}[inner[0]]


def _before_the_last_state(config: ModelConfig, name: str) -> bool:
    """See `ContextTower.parts`: of the last layer with a state only what the state needs."""
    if not name.startswith("layers."):
        return name.startswith("embeddings")
    last = max(config.hybrid_override_pattern.rfind(kind) for kind in "M*")
    index = int(name.split(".")[1])
    return index < last or (index == last and ".q_proj" not in name and ".o_proj" not in name)
