"""Towers that follow a script instead of weights, over the real cache: what they say depends on every position read.

The next token is a function of the sum of (position + 1) · token over all that has been read. A token lost, doubled,
out of order or in another sequence's page changes everything after it, and the arithmetic is exact: no near-ties.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.config import ModelConfig
from twotower.core import Mode, Request, ScoreRequest
from twotower.model.row_states import ExtendStates, ReadStates

VOCAB = 32
_FIRST, _CHOICES = 4, VOCAB - 4
CONFIG = ModelConfig(
    hybrid_override_pattern="*",
    vocab_size=VOCAB,
    hidden_size=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=1,
)


class _ScriptedTower:
    config = CONFIG
    device = torch.device("cpu")
    dtype = torch.float32

    def logits(self, hidden_RLD: Tensor) -> Tensor:
        """The scripted token's logit stands out by more or less, so that a block takes several steps."""
        total, place = hidden_RLD[..., 0].long(), hidden_RLD[..., 1].long()
        choice = (total + 5 * place + place * place) % _CHOICES
        logits = torch.zeros(*choice.shape, VOCAB)
        strength = 2.0 + (total + 3 * place) % 9
        return logits.scatter(-1, (choice + _FIRST)[..., None], strength[..., None])


class ScriptedContextTower(_ScriptedTower):
    """Stands in for ContextTower."""

    causal = True

    def __call__(self, tokens_RL: Tensor, states: ExtendStates, only_states: bool = False) -> Tensor:
        new = tokens_RL[..., None, None].float()
        keys_RT = states.keys_values(0, new, new)[0][..., 0, 0]
        weight_T = torch.arange(1, keys_RT.shape[1] + 1).float()
        total_RL = (states.mask_RLT * (weight_T * keys_RT)[:, None]).sum(-1)
        return torch.stack([total_RL, torch.zeros_like(total_RL)], dim=-1)


class ScriptedDenoiserTower(_ScriptedTower):
    """Stands in for DenoiserTower: position i of a block depends on the cache and on i, not on the block's tokens."""

    causal = False

    def __call__(self, tokens_RL: Tensor, states: ReadStates, t_R: Tensor | None) -> Tensor:
        rows, width = tokens_RL.shape
        new = tokens_RL[..., None, None].float()
        keys_RT = states.keys_values(0, new, new)[0][..., 0, 0]
        cached = keys_RT.shape[1] - width
        weight_T = torch.arange(1, cached + 1).float()
        total_R = (states.mask_RLT[:, 0, :cached] * weight_T * keys_RT[:, :cached]).sum(-1)
        if t_R is None:
            total_R = total_R + (torch.tensor(states.starts) + 1) * tokens_RL[:, 0]
        places_RL = torch.arange(width).expand(rows, width) if t_R is not None else torch.zeros(rows, 1)
        return torch.stack([total_R[:, None].expand(rows, width), places_RL.float()], dim=-1)


def scripted_tokens(request: Request) -> list[int]:
    """What the scripted towers must give for a request, worked out without engines, caches or batches."""
    params = request.params
    read = list(request.prompt_token_ids)
    new: list[int] = []
    width = params.block_size if params.mode is Mode.DIFFUSION else 1
    while len(new) < params.max_new_tokens:
        block = [_choice(read, place) for place in range(width)]
        for token in block:
            new.append(token)
            if token in params.stop_token_ids or len(new) == params.max_new_tokens:
                return new
        read += block
    return new


def scripted_scores(request: ScoreRequest) -> list[tuple[float, bool]]:
    """Log-probability and greediness that the scripted context tower must give for each token that is scored."""
    tokens, scored = request.token_ids, []
    for place in range(request.start, len(tokens)):
        strength = 2.0 + _total(tokens[:place]) % 9
        is_greedy = tokens[place] == _choice(tokens[:place], 0)
        log_prob = (strength if is_greedy else 0.0) - math.log(math.exp(strength) + VOCAB - 1)
        scored.append((log_prob, is_greedy))
    return scored


def _total(read: Sequence[int]) -> int:
    return sum((position + 1) * token for position, token in enumerate(read))


def _choice(read: Sequence[int], place: int) -> int:
    total = _total(read)
    return (total + 5 * place + place * place) % _CHOICES + _FIRST
