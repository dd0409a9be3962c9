"""Grouped-query attention without any positional encoding (the released model has none)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import ModelConfig
from twotower.model.in_pages import InPages
from twotower.model.states import LayerStates, Reach

Attend = Callable[[Tensor, Tensor, Tensor, Reach], Tensor]
AttendInPages = Callable[[Tensor, InPages], Tensor]


def attend(queries_RLHE: Tensor, keys_RTSE: Tensor, values_RTSE: Tensor, reach: Reach) -> Tensor:
    """What each query sees of its keys [R,L,H,E]. `twotower.model.kernels` puts faster ones in its place."""
    out_RHLE = F.scaled_dot_product_attention(
        queries_RLHE.transpose(1, 2),
        keys_RTSE.transpose(1, 2),
        values_RTSE.transpose(1, 2),
        attn_mask=reach.mask_RLT.unsqueeze(1),
        enable_gqa=bool(queries_RLHE.shape[2] != keys_RTSE.shape[2]),
    )
    return out_RHLE.transpose(1, 2)


class Attention(nn.Module):
    """Query head i reads key/value head i // (heads / kv heads). Keys and values are cached as projected."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=bias)
        self.attend: Attend = attend
        self.attend_in_pages: AttendInPages | None = None  # where a kernel reads pages that hold enough

    def forward(self, x_RLD: Tensor, layer: int, states: LayerStates) -> Tensor:
        queries_RLHE = self.q_proj(x_RLD).unflatten(-1, (self.heads, self.head_dim))
        seen = self.project(x_RLD, layer, states)
        if isinstance(seen, InPages):
            assert self.attend_in_pages is not None
            out_RLHE = self.attend_in_pages(queries_RLHE, seen)
        else:
            out_RLHE = self.attend(queries_RLHE, *seen, states)
        out: Tensor = self.o_proj(out_RLHE.flatten(2))
        return out

    def project(self, x_RLD: Tensor, layer: int, states: LayerStates) -> InPages | tuple[Tensor, Tensor]:
        """The new positions' keys and values into `states`; all that these may look at: [R,T,S,E], or in its pages."""
        keys_RLSE = self.k_proj(x_RLD).unflatten(-1, (self.kv_heads, self.head_dim))
        values_RLSE = self.v_proj(x_RLD).unflatten(-1, (self.kv_heads, self.head_dim))
        in_pages = None if self.attend_in_pages is None else states.in_pages(layer, keys_RLSE, values_RLSE)
        return in_pages or states.keys_values(layer, keys_RLSE, values_RLSE)
