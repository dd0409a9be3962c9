"""A step's decision as it was first written, over the logits of whole blocks. The decision over masked positions is
compared with it bit for bit. Knows no restricted positions.
"""

import torch
from torch import Tensor

from twotower.decoding.margins import closest, runner_up
from twotower.decoding.unmasking import Blocks, StepParams

_WORD = 0xFFFFFFFF
_BANNED = -1e12


def unmask(logits_RLV: Tensor, blocks: Blocks, mask_token_id: int) -> Tensor:
    given_RX = blocks.given(logits_RLV.device, logits_RLV.shape[1])
    sum_R1 = logits_RLV.sum((1, 2))[:, None]
    logits_RLV[..., mask_token_id].fill_(_BANNED)
    probabilities_RLV = logits_RLV.softmax(-1)
    predicted_RL = probabilities_RLV.max(-1).indices
    which = [row for row, params in enumerate(blocks.rows) if params.samples]
    drawn_ratio_ML = None
    if which:
        drawn_ML, drawn_ratio_ML = _gumbel_argmax(logits_RLV[which], [blocks.rows[row] for row in which])
        predicted_RL[which] = drawn_ML
    confidence_RL = probabilities_RLV.gather(2, predicted_RL[..., None])[..., 0]
    ratio_RL = runner_up(probabilities_RLV, predicted_RL[..., None], 0.0) / confidence_RL
    width = confidence_RL.shape[1]
    tokens_RL, masked_RL, threshold_R1, at_least_R1 = given_RX.split([width, width, 1, 1], dim=1)
    keys_RL = torch.where(masked_RL != 0, confidence_RL, -1.0)
    ordered_RL, order_RL = keys_RL.sort(dim=1, stable=True)
    above_R1 = (ordered_RL > threshold_R1).sum(1, keepdim=True)
    last_RL = torch.arange(width, 0, -1) <= torch.maximum(above_R1, at_least_R1)
    committed_RL = last_RL.scatter(1, order_RL, last_RL)
    decided_RL = committed_RL.clone()
    if drawn_ratio_ML is not None:
        ratio_RL[which], decided_RL[which] = drawn_ratio_ML, masked_RL[which] != 0
    out_RL = torch.where(committed_RL, predicted_RL, tokens_RL)
    ratio_R1 = closest(ratio_RL, decided_RL)[:, None]
    return torch.cat([out_RL, committed_RL, predicted_RL, confidence_RL, ordered_RL, above_R1, ratio_R1, sum_R1], dim=1)


def uniform(keys: list[int], positions: int, vocab: int) -> Tensor:
    """[R, positions, vocab], in 64-bit words."""
    keys_R, position_L, token_V = torch.tensor(keys), torch.arange(positions), torch.arange(vocab)
    low_RL = _mix((keys_R & _WORD)[:, None] ^ (position_L * 0x9E3779B1 & _WORD))
    high_RL = _mix((keys_R >> 32)[:, None] ^ low_RL)
    bits_RLV = _mix(_mix(high_RL[..., None] ^ (token_V * 0x85EBCA77 & _WORD)) ^ low_RL[..., None])
    return (bits_RLV >> 8).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def _gumbel_argmax(logits_MLV: Tensor, rows: list[StepParams]) -> tuple[Tensor, Tensor]:
    temperatures_M1 = torch.tensor([row.temperature for row in rows])[:, None]
    u = uniform([row.key for row in rows], *logits_MLV.shape[1:])
    gumbel = u.clamp(min=1e-10).log_().neg_().log_().neg_()
    scores = (logits_MLV / temperatures_M1[..., None]).log_softmax(-1).add_(gumbel)
    best, drawn = scores.max(-1)
    gap = best - runner_up(scores, drawn[..., None], -torch.inf)
    return drawn, torch.exp(-gap * temperatures_M1.clamp(max=1))
