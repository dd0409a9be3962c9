"""The mixture of experts: sigmoid router in fp64, non-gated experts, one shared expert."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import ModelConfig
from twotower.model.layers import Mlp, activation
from twotower.model.quantised import QuantisedExperts

# Up to this many experts for each one chosen, and this many tokens, computing all of them costs less than sorting.
_FEW_EXPERTS = 4
FEW_TOKENS = 32
# The GPUs for which torch builds a kernel of bf16 grouped products, by the first number of their compute capability.
_GROUPED_ON = (9, 10)


def grouped_products_wait(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped products copy the groups' ends to the host and loop over them there. Then the host waits,
    and no CUDA graph can capture the products.
    """
    if device.type != "cuda":
        return False
    return dtype is not torch.bfloat16 or torch.cuda.get_device_capability(device)[0] not in _GROUPED_ON


class Router(nn.Module):
    """Scores experts and picks `num_experts_per_tok` for each token. Scores in fp64, as the released code does.

    `e_score_correction_bias` moves the choice, never the weight of the chosen.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """For M tokens: chosen experts [M,k] and their weights [M,k] in fp32."""
        scores_ME = torch.sigmoid(x_MD.double() @ self.weight.double().T)
        corrected_ME = self._within_groups(scores_ME + self.e_score_correction_bias.double())
        chosen_Mk = corrected_ME.topk(self.config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights_Mk = scores_ME.gather(1, chosen_Mk)
        if self.config.norm_topk_prob:
            weights_Mk = weights_Mk / (weights_Mk.sum(-1, keepdim=True) + 1e-20)
        return chosen_Mk, (weights_Mk * self.config.routed_scaling_factor).float()

    def _within_groups(self, corrected_ME: Tensor) -> Tensor:
        """Keep the experts of the best groups. The others' scores become 0.0, not -inf, as in the released code."""
        groups = self.config.n_group
        if groups == 1:
            return corrected_ME
        grouped = corrected_ME.unflatten(1, (groups, -1))
        best_two = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = best_two.topk(self.config.topk_group, dim=-1, sorted=False).indices
        keep_MG = torch.zeros_like(best_two).scatter_(1, kept, 1.0)
        return grouped.masked_fill(keep_MG[..., None] == 0, 0.0).flatten(1)


class Experts(nn.Module):
    """The routed experts, fused: up_proj [E,I,D], down_proj [E,D,I] (the files hold one matrix an expert)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, inner, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.up_proj = nn.Parameter(torch.zeros(experts, inner, hidden))
        self.down_proj = nn.Parameter(torch.zeros(experts, hidden, inner))
        self.up_bias = nn.Parameter(torch.zeros(experts, inner)) if config.mlp_bias else None
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden)) if config.mlp_bias else None
        self.act = activation(config.mlp_hidden_act)

    def forward(self, x_MD: Tensor, chosen_Mk: Tensor, weights_Mk: Tensor) -> Tensor:
        """Weighted sum [M,D] over each token's experts, in fp32."""
        experts, per_token = self.up_proj.shape[0], chosen_Mk.shape[1]
        few = experts <= _FEW_EXPERTS * per_token and x_MD.shape[0] <= FEW_TOKENS
        if few and self.up_bias is None and x_MD.dtype is torch.float32:
            return self._all_experts(x_MD, chosen_Mk, weights_Mk)
        return self._chosen_experts(x_MD, chosen_Mk, weights_Mk)

    def _all_experts(self, x_MD: Tensor, chosen_Mk: Tensor, weights_Mk: Tensor) -> Tensor:
        """Every expert for every token: two plain products and a sum; experts that were not chosen get the weight 0."""
        experts, inner, _ = self.up_proj.shape
        weights_ME = weights_Mk.new_zeros(x_MD.shape[0], experts).scatter(1, chosen_Mk, weights_Mk)
        inner_MEI = self.act(F.linear(x_MD, self.up_proj.flatten(0, 1))).unflatten(1, (experts, inner))
        weighted_EMI = (inner_MEI * weights_ME[..., None]).transpose(0, 1)
        return (weighted_EMI @ self.down_proj.transpose(1, 2)).sum(0)

    def _chosen_experts(self, x_MD: Tensor, chosen_Mk: Tensor, weights_Mk: Tensor) -> Tensor:
        """Tokens sorted by expert, then grouped products."""
        per_token = chosen_Mk.shape[1]
        order = chosen_Mk.flatten().argsort(stable=True)
        tokens = order // per_token
        experts = chosen_Mk.flatten()[order]
        # Where each expert's tokens end. Found by search, because a count by expert would make a GPU's host wait.
        ends = torch.searchsorted(experts, self._numbers(experts.device), right=True, out_int32=True)
        inner = F.grouped_mm(x_MD[tokens], self.up_proj.transpose(1, 2), offs=ends)
        if self.up_bias is not None:
            inner = inner + self.up_bias[experts]
        out = F.grouped_mm(self.act(inner), self.down_proj.transpose(1, 2), offs=ends)
        if self.down_bias is not None:
            out = out + self.down_bias[experts]
        weighted = out.float() * weights_Mk.flatten()[order, None]
        return weighted.new_zeros(x_MD.shape).index_add_(0, tokens, weighted)

    def _numbers(self, device: torch.device) -> Tensor:
        return torch.arange(self.up_proj.shape[0], device=device)


class MixtureOfExperts(nn.Module):
    """One `E` layer: routed experts, plus exactly one shared expert that is neither gated nor scaled."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config) if config.experts is None else QuantisedExperts(config)
        self.shared_experts = Mlp(
            config.hidden_size,
            config.moe_shared_expert_intermediate_size,
            config.mlp_bias,
            config.mlp_hidden_act,
        )

    def forward(self, x_RLD: Tensor) -> Tensor:
        x_MD = x_RLD.flatten(0, 1)
        chosen_Mk, weights_Mk = self.gate(x_MD)
        routed = self.experts(x_MD, chosen_Mk, weights_Mk).to(x_RLD.dtype)
        shared: Tensor = self.shared_experts(x_RLD)
        return routed.view_as(x_RLD) + shared
