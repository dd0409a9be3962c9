"""The next token of causal modes (`ar`, `mock_ar`): greedy, or temperature with top-k and top-p, per row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.decoding.randomness import uniform
from twotower.model.transfer import on_device

GREEDY_BELOW = 1e-5  # a temperature that only fp32 overflow tells from 0


@dataclass(frozen=True, slots=True)
class TokenParams:
    """How one row samples. `top_k` 0 and `top_p` 1 are off; `key` names this position's random number."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    key: int = 0


def sample(logits_RV: Tensor, rows: list[TokenParams]) -> Tensor:
    """One token id [R] per row of fp32 logits. Greedy takes the lowest index on a tie."""
    tokens_R = logits_RV.argmax(-1)
    sampled = [r for r, row in enumerate(rows) if row.temperature >= GREEDY_BELOW]
    if sampled:
        which_M = on_device(sampled, logits_RV.device)
        tokens_R = tokens_R.index_copy(0, which_M, _draw(logits_RV[which_M], [rows[r] for r in sampled]))
    return tokens_R


def _draw(logits_RV: Tensor, rows: list[TokenParams]) -> Tensor:
    """softmax at the temperature, then top-k (ties kept), then top-p (the crossing token kept), then one draw."""
    device = logits_RV.device
    temperatures_R1 = on_device([row.temperature for row in rows], device)[:, None]
    sorted_RV, order_RV = (logits_RV / temperatures_R1).softmax(-1).sort(dim=-1, descending=True, stable=True)
    vocab = logits_RV.shape[1]
    last = [min(row.top_k or vocab, vocab) - 1 for row in rows]
    kth_R1 = sorted_RV.gather(1, on_device(last, device)[:, None])
    kept_RV = sorted_RV * (sorted_RV >= kth_R1)
    kept_RV = kept_RV / kept_RV.sum(-1, keepdim=True)
    top_p_R1 = on_device([row.top_p for row in rows], device)[:, None]
    before_RV = kept_RV.cumsum(-1) - kept_RV
    kept_RV = kept_RV * ((before_RV < top_p_R1) | (top_p_R1 >= 1))
    total_RV = kept_RV.cumsum(-1)
    u_R1 = uniform([row.key for row in rows], 1, 1, device)[:, 0] * total_RV[:, -1:]
    # `right`: a draw of exactly 0 must not pick a token of zero probability.
    place_R1 = torch.searchsorted(total_RV, u_R1, right=True).clamp(max=vocab - 1)
    return order_RV.gather(1, place_R1)[:, 0]
