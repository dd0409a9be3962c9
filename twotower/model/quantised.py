"""Routed experts with weights in 8 or 4 bits: how they are made, and how a pass multiplies with them.

E experts, N outputs, K inputs, G groups of a channel, B bytes of a group, T rows sorted by their expert. Weights are
symmetric around 0. Byte b of an int4 group holds weight b in the low half and weight b + B in the high half, each plus
8.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twotower.config import ModelConfig
from twotower.errors import CheckpointError
from twotower.expert_formats import ExpertFormat
from twotower.model.layers import activation

_NARROWER = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Of a group's range: clipping its extreme a little often costs less than spreading 16 values over all of it."""


class Packed(NamedTuple):
    """The matrices of all experts: bytes [E,N,G,B] and scales [E,N,G]."""

    weights: Tensor
    scales: Tensor


GroupedProduct = Callable[[Tensor, Packed, Tensor], Tensor]
"""Rows [T,K], matrices and the rows at which each expert's end [E] (int32): products [T,N] in the rows' dtype."""


def quantise(weight_NK: Tensor, form: ExpertFormat) -> Packed:
    """One matrix, without its experts' dimension. Raises CheckpointError for numbers that are not finite."""
    groups_NGk = weight_NK.float().unflatten(-1, (form.groups(weight_NK.shape[-1]), -1))
    if not groups_NGk.isfinite().all():
        raise CheckpointError("got weights that are not finite, wanted finite ones to quantise")
    if form.bits == 8:
        scales_NG = _not_zero(groups_NGk.abs().amax(-1) / 127)
        return Packed((groups_NGk / scales_NG[..., None]).round_().clamp_(-127, 127).to(torch.int8), scales_NG)
    scales_NG = _best_scales(groups_NGk)
    levels_NGk = (_levels(groups_NGk, scales_NG) + 8).to(torch.uint8)
    low_NGB, high_NGB = levels_NGk.chunk(2, dim=-1)
    return Packed(low_NGB | (high_NGB << 4), scales_NG)


def dequantised(packed: Packed) -> Tensor:
    """The weights [...,N,K] that a matrix stands for, in fp32."""
    weights = packed.weights
    if weights.dtype is torch.uint8:
        levels = torch.cat([weights & 15, weights >> 4], dim=-1).float() - 8
    else:
        levels = weights.float()
    return (levels * packed.scales.float()[..., None]).flatten(-2)


def _best_scales(groups_NGk: Tensor) -> Tensor:
    """For each group the candidate scale with the least squared error, in bf16. The group's extreme becomes -8, which
    has no positive counterpart, so a scale may be negative.
    """
    extreme_NG1 = groups_NGk.gather(-1, groups_NGk.abs().argmax(-1, keepdim=True))
    best_NG = least_NG = None
    for narrower in _NARROWER:
        scales_NG = _not_zero((extreme_NG1[..., 0] * (narrower / -8)).bfloat16())
        error_NGk = _levels(groups_NGk, scales_NG) * scales_NG.float()[..., None] - groups_NGk
        error_NG = error_NGk.square_().sum(-1)
        if best_NG is None or least_NG is None:
            best_NG, least_NG = scales_NG, error_NG
        else:
            best_NG = torch.where(error_NG < least_NG, scales_NG, best_NG)
            least_NG = torch.minimum(error_NG, least_NG)
    assert best_NG is not None
    return best_NG


def _levels(groups_NGk: Tensor, scales_NG: Tensor) -> Tensor:
    return (groups_NGk / scales_NG.float()[..., None]).round_().clamp_(-8, 7)


def _not_zero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _plain_product(x_TK: Tensor, weights: Tensor, scales: Tensor, ends_E: Tensor) -> Tensor:
    """Expert by expert, skipping experts without rows: at most one matrix is unpacked at a time."""
    out_TN = x_TK.new_empty(x_TK.shape[0], weights.shape[1])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            weight_NK = dequantised(Packed(weights[expert], scales[expert])).to(x_TK.dtype)
            torch.mm(x_TK[start:end], weight_NK.T, out=out_TN[start:end])
        start = end
    return out_TN


# A separate torch operation, because it reads `ends_E`: a recorded pass keeps the operation, not its inner steps.
_OURS = torch.library.Library("twotower", "DEF")
_OURS.define("quantised_product(Tensor x, Tensor weights, Tensor scales, Tensor ends) -> Tensor")
_OURS.impl("quantised_product", _plain_product, "CompositeExplicitAutograd")


def plain_product(x_TK: Tensor, packed: Packed, ends_E: Tensor) -> Tensor:
    """The reference: weights in the rows' dtype, then torch's product. On CUDA it makes the host wait."""
    out: Tensor = torch.ops.twotower.quantised_product(x_TK, *packed, ends_E)
    return out


class QuantisedExperts(nn.Module):
    """`moe.Experts` in `config.experts`' format: up_proj [E,I,G,B] with up_scale [E,I,G], down_proj likewise."""

    up_proj: Tensor
    up_scale: Tensor
    down_proj: Tensor
    down_scale: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        form = config.experts
        assert form is not None
        self.product: GroupedProduct = plain_product
        self.act = activation(config.mlp_hidden_act)
        experts, inner, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        for part, outputs, inputs in (("up", inner, hidden), ("down", hidden, inner)):
            weights = torch.zeros(experts, *form.packed(outputs, inputs), dtype=_bytes_of(form))
            scales = torch.ones(experts, outputs, form.groups(inputs), dtype=_scales_of(form))
            self.register_buffer(f"{part}_proj", weights)
            self.register_buffer(f"{part}_scale", scales)
        self.up_bias = nn.Parameter(torch.zeros(experts, inner)) if config.mlp_bias else None
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden)) if config.mlp_bias else None

    def forward(self, x_MD: Tensor, chosen_Mk: Tensor, weights_Mk: Tensor) -> Tensor:
        """Weighted sum [M,D] over each token's experts, in fp32. A token's terms are added in the order of its own
        choice, independent of other tokens.
        """
        per_token, hidden = chosen_Mk.shape[1], x_MD.shape[1]
        order_T = chosen_Mk.flatten().argsort(stable=True)
        experts_T = chosen_Mk.flatten()[order_T]
        numbers_E = torch.arange(self.up_proj.shape[0], device=x_MD.device)
        ends_E = torch.searchsorted(experts_T, numbers_E, right=True, out_int32=True)
        inner_TI = self.product(x_MD[order_T // per_token], Packed(self.up_proj, self.up_scale), ends_E)
        if self.up_bias is not None:
            inner_TI = inner_TI + self.up_bias[experts_T]
        out_TD = self.product(self.act(inner_TI), Packed(self.down_proj, self.down_scale), ends_E)
        if self.down_bias is not None:
            out_TD = out_TD + self.down_bias[experts_T]
        by_token_MkD = torch.empty_like(out_TD).index_copy_(0, order_T, out_TD).view(-1, per_token, hidden)
        return (by_token_MkD.float() * weights_Mk[..., None]).sum(1)


def _bytes_of(form: ExpertFormat) -> torch.dtype:
    return torch.int8 if form.bits == 8 else torch.uint8


def _scales_of(form: ExpertFormat) -> torch.dtype:
    return torch.bfloat16 if form.group else torch.float32
