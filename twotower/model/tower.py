"""The towers: a stack of one-mixer layers with an embedding and a head; the denoiser's is time-conditioned."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from twotower.config import ModelConfig
from twotower.model.attention import Attention
from twotower.model.conditioning import Modulation, TimeConditioning, modulations
from twotower.model.layers import Mlp, RmsNorm
from twotower.model.mamba import MambaMixer
from twotower.model.moe import MixtureOfExperts
from twotower.model.states import LayerStates


class Layer(nn.Module):
    """`x + mixer(norm(x))`, one mixer of one kind; or the modulated form of it."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.kind = config.hybrid_override_pattern[index]
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RmsNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = _mixer(config, self.kind)

    def forward(self, x_RLD: Tensor, states: LayerStates, modulation: Modulation | None) -> Tensor:
        residual = x_RLD.float() if self.residual_in_fp32 else x_RLD
        if modulation is None:
            return residual + self._mix(self.norm(x_RLD), states)
        # Sequence mixers are modulated before their norm, position-wise ones after it.
        hidden = self.norm(modulation(x_RLD)) if self.kind in "M*" else modulation(self.norm(x_RLD))
        return torch.addcmul(residual, self._mix(hidden, states), modulation.gate)

    def keep(self, x_RLD: Tensor, states: LayerStates) -> None:
        """Extend the states as `forward` does, and compute nothing else."""
        hidden = self.norm(x_RLD)
        if isinstance(self.mixer, Attention):
            self.mixer.project(hidden, self.index, states)
        else:
            self._mix(hidden, states)

    def _mix(self, hidden: Tensor, states: LayerStates) -> Tensor:
        out: Tensor = self.mixer(hidden, self.index, states) if self.kind in "M*" else self.mixer(hidden)
        return out


def _mixer(config: ModelConfig, kind: str) -> nn.Module:
    if kind == "M":
        return MambaMixer(config)
    if kind == "*":
        return Attention(config)
    if kind == "E":
        return MixtureOfExperts(config)
    return Mlp(config.hidden_size, config.intermediate_size, config.mlp_bias, config.mlp_hidden_act)


class Tower(nn.Module):
    """The common part of both towers. Parameter names are the files' names without the tower's prefix.

    `causal`: its passes extend the states they read.
    """

    causal: bool

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.plain_only = False  # whether only the plain functions may be used
        self.kernels = "torch"  # what computes the layers, in words; `twotower.model.kernels.install` changes both
        # Weights come from a checkpoint or a recipe. Drawing `nn.Embedding`'s own on the meta device would make torch
        # import its compiler: 80 MB and a second in every process that loads a tower.
        unset_VD = torch.zeros(config.vocab_size, config.hidden_size)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, _weight=unset_VD)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm_f = RmsNorm(config.hidden_size, config.layer_norm_epsilon)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.weight.dtype

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [..., V] of any hidden states [..., D] that `forward` returned."""
        return self.raw_logits(hidden).float()

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """The same in the model's dtype, as the head computes them."""
        out: Tensor = self.head(self.norm_f(hidden))
        return out


class ContextTower(Tower):
    """The causal tower. Its memory is in `states`, which the pass extends."""

    causal = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.last_kept = max(config.hybrid_override_pattern.rfind(kind) for kind in "M*")  # the last layer with a state

    def forward(self, tokens_RL: Tensor, states: LayerStates, only_states: bool = False) -> Tensor:
        """Hidden states [R,L,D] after the last layer, before the final norm.

        `only_states`: nothing after the last state is computed, and the result is undefined.
        """
        [x_RLD] = self.parts(tokens_RL, states, 1, only_states)
        return x_RLD

    def parts(self, tokens_RL: Tensor, states: LayerStates, count: int, only_states: bool = False) -> Iterator[Tensor]:
        """The same pass in `count` parts of about as many layers each; the last part yields the result."""
        x_RLD: Tensor = self.embeddings(tokens_RL)
        for part in range(count):
            first, end = (len(self.layers) * place // count for place in (part, part + 1))
            for index in range(first, end):
                layer = cast(Layer, self.layers[index])
                if not only_states or index < self.last_kept:
                    x_RLD = layer(x_RLD, states, None)
                elif index == self.last_kept:
                    layer.keep(x_RLD, states)
            yield x_RLD


class DenoiserTower(Tower):
    """The tower that fills a block, seeing it both ways in attention, seeded by the context tower's states."""

    causal = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.time = TimeConditioning(config.hidden_size)
        self.scale_shift_tables = nn.Parameter(torch.zeros(config.num_layers, 3, config.hidden_size))

    def forward(self, tokens_RL: Tensor, states: LayerStates, t_R: Tensor | None) -> Tensor:
        """Hidden states [R,L,D] of one step. `t_R`: mask fraction of each row; None: no conditioning (mock-AR)."""
        x_RLD: Tensor = self.embeddings(tokens_RL)
        per_layer: Sequence[Modulation | None] = [None] * len(self.layers)
        if t_R is not None:
            per_layer = modulations(self.time(t_R), self.scale_shift_tables)
        for layer, modulation in zip(self.layers, per_layer, strict=True):
            x_RLD = layer(x_RLD, states, modulation)
        return x_RLD
