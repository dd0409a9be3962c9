"""Attention with the query heads of one key/value head laid side by side, as more queries of a single head.

torch's fused kernels on CUDA take either a mask or fewer key/value heads than query heads, not both. Flash refuses the
mask, the memory-efficient kernel the grouping, and the remaining path materialises the scores. Folded heads are not
grouped any more, so the memory-efficient kernel takes them, without repeating a key.
"""

import torch.nn.functional as F
from torch import Tensor

from twotower.model.states import Reach


def attend_folded(queries_RLHE: Tensor, keys_RTSE: Tensor, values_RTSE: Tensor, reach: Reach) -> Tensor:
    """As `attention.attend`. G query heads read each of S key/value heads."""
    length, kv_heads = queries_RLHE.shape[1], keys_RTSE.shape[2]
    queries_RSGLE = queries_RLHE.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    group = queries_RSGLE.shape[2]
    mask_R1QT = reach.mask_RLT[:, None].expand(-1, group, -1, -1).flatten(1, 2)[:, None]
    out_RSQE = F.scaled_dot_product_attention(
        queries_RSGLE.flatten(2, 3), keys_RTSE.transpose(1, 2), values_RTSE.transpose(1, 2), attn_mask=mask_R1QT
    )
    return out_RSQE.unflatten(2, (group, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)
