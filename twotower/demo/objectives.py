"""The training losses. All run the very towers that serve; nothing here is a second implementation of them.

The denoiser's conditioning: serving always feeds t = (masked positions of the block) / (block width). So training
draws the count first, masks exactly as many positions and feeds exactly this t. The paper draws t ~ U[1e-3, 1] per
sequence and masks each position with probability t. That has the same mean, but its t is off by the binomial noise,
which is large for a block of 16. The full mask gets an extra share, because every block starts there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.demo.batches import IGNORED, BlockBatch, CausalBatch, NextTokenBatch
from twotower.demo.states import FromNothing, Reading
from twotower.demo.tokenizer import MASK_ID
from twotower.model.tower import ContextTower, DenoiserTower

FULL_MASK_SHARE = 0.2
SUFFIX_SHARE = 0.5


def context_loss(tower: ContextTower, batches: Sequence[CausalBatch]) -> Tensor:
    """Mean cross-entropy of the answers' tokens under the causal tower, over all batches together."""
    wanted = sum(int((batch.targets_RL != IGNORED).sum()) for batch in batches)
    return torch.stack([_summed_loss(tower, batch) for batch in batches]).sum() / wanted


def _summed_loss(tower: ContextTower, batch: CausalBatch) -> Tensor:
    rows, length = batch.tokens_RL.shape
    states = FromNothing(tower.config, rows, length, tower.device)
    hidden_RLD = tower(batch.tokens_RL, states)
    wanted_RL = batch.targets_RL != IGNORED
    return F.cross_entropy(tower.logits(hidden_RLD[wanted_RL]), batch.targets_RL[wanted_RL], reduction="sum")


def read_batch(context: ContextTower, batch: BlockBatch) -> Reading:
    """Let the frozen context tower read the prompts and every block but each row's last."""
    reading = Reading(context.config, len(batch.lengths_R), context.device)
    reading.read(context, batch.prompts_RP, batch.lengths_R)
    if (most := int(batch.num_blocks_R.max())) > 1:
        reading.read_blocks(context, batch.answers_RZW[:, : most - 1])
    return reading


def draw_masks(blocks: int, width: int, generator: torch.Generator) -> Tensor:
    """Masks [B,W] with 1..W masked positions, all counts equally likely but the full one, which gets more.

    Half of the masks hide everything behind a point, the others hide positions at random. Some tokens follow from those
    before them, such as a sum's next digit. Random holes seldom leave visible what such a token needs.
    """
    counts_B = torch.randint(1, width + 1, (blocks,), generator=generator)
    full_B = torch.rand(blocks, generator=generator) < FULL_MASK_SHARE
    counts_B = torch.where(full_B, width, counts_B)
    ranks_BW = torch.rand(blocks, width, generator=generator).argsort(1).argsort(1)
    suffix_B = torch.rand(blocks, generator=generator) < SUFFIX_SHARE
    ranks_BW = torch.where(suffix_B[:, None], torch.arange(width).flip(0), ranks_BW)
    return ranks_BW < counts_B[:, None]


def later_masks(mask_BW: Tensor, confidence_BW: Tensor, generator: torch.Generator) -> Tensor:
    """What a decoder leaves masked of `mask_BW` some steps later. The most confident positions are unmasked: at least
    one, and as many more as chance says. Where only one was masked, it stays masked.
    """
    left_B = mask_BW.sum(1)
    drawn_B = torch.rand(len(left_B), generator=generator).to(left_B.device)
    keep_B = (drawn_B * (left_B - 1)).long().clamp(min=1)
    ranks_BW = confidence_BW.masked_fill(~mask_BW, torch.inf).argsort(1).argsort(1)
    return ranks_BW < keep_B[:, None]


def denoiser_loss(
    context: ContextTower, denoiser: DenoiserTower, batch: BlockBatch, generator: torch.Generator
) -> Tensor:
    """Mean cross-entropy of the masked tokens of every block under two masks. No weight 1/t, no shift.

    The second mask is what the denoiser's own decoding, if it was right, would leave of the first. Chance alone seldom
    draws what serving shows: everything easy written and the hard positions open, where a sum's carry is decided.
    """
    reading = read_batch(context, batch)
    rows_B, blocks_B = _every_block(batch.num_blocks_R)
    truth_BW = batch.answers_RZW[rows_B, blocks_B]
    first_BW = draw_masks(len(truth_BW), truth_BW.shape[1], generator).to(truth_BW.device)
    first_XV = masked_logits(denoiser, reading, rows_B, blocks_B, truth_BW, first_BW)
    confidence_X = first_XV.detach().softmax(1).amax(1)
    confidence_BW = torch.zeros(first_BW.shape, device=first_BW.device).masked_scatter(first_BW, confidence_X)
    second_BW = later_masks(first_BW, confidence_BW, generator)
    second_XV = masked_logits(denoiser, reading, rows_B, blocks_B, truth_BW, second_BW)
    return F.cross_entropy(torch.cat([first_XV, second_XV]), torch.cat([truth_BW[first_BW], truth_BW[second_BW]]))


def masked_logits(
    denoiser: DenoiserTower, reading: Reading, rows_B: Tensor, blocks_B: Tensor, truth_BW: Tensor, mask_BW: Tensor
) -> Tensor:
    """Logits [X,V] at the X masked positions of the blocks; the mask token itself is never an answer."""
    seen_BW = truth_BW.masked_fill(mask_BW, MASK_ID)
    t_B = mask_BW.float().mean(1)
    hidden_BWD = denoiser(seen_BW, reading.blocks(rows_B, blocks_B, seen_BW.shape[1]), t_B)
    logits_XV = denoiser.logits(hidden_BWD[mask_BW])
    mask_token_V = F.one_hot(torch.tensor(MASK_ID), logits_XV.shape[1]).bool().to(logits_XV.device)
    return logits_XV.masked_fill(mask_token_V, -1e12)


def _every_block(num_blocks_R: Tensor) -> tuple[Tensor, Tensor]:
    """Row and block number of each existing block."""
    pairs = [(row, block) for row, count in enumerate(num_blocks_R.tolist()) for block in range(count)]
    rows, blocks = zip(*pairs, strict=True)
    return torch.tensor(rows, device=num_blocks_R.device), torch.tensor(blocks, device=num_blocks_R.device)


def mock_ar_loss(context: ContextTower, denoiser: DenoiserTower, batch: NextTokenBatch) -> Tensor:
    """Mean cross-entropy of the next token, as `mock_ar` predicts it in serving. The denoiser reads the newest token
    alone, without time conditioning, against the states of all tokens before it. A fresh denoiser is a copy of the
    context tower and can do this; the loss keeps it from forgetting.
    """
    reading = Reading(context.config, len(batch.lengths_R), context.device)
    reading.read(context, batch.before_RL, batch.lengths_R)
    rows_R = torch.arange(len(batch.lengths_R), device=context.device)
    hidden_R1D = denoiser(batch.newest_R[:, None], reading.blocks(rows_R, torch.zeros_like(rows_R), 1), None)
    return F.cross_entropy(denoiser.logits(hidden_R1D[:, 0]), batch.targets_R)
