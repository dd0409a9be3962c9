"""Training and serving are one function: what the denoiser sees of a block in training is what a server shows it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as BpeTokenizer
from torch import Tensor

from twotower.config import ModelConfig
from twotower.demo.batches import IGNORED, BlockBatch, block_batch, causal_batches, next_token_batch
from twotower.demo.corpus import Instance
from twotower.demo.initialise import new_context_tower, new_denoiser_tower
from twotower.demo.objectives import (
    context_loss,
    denoiser_loss,
    draw_masks,
    later_masks,
    masked_logits,
    mock_ar_loss,
    read_batch,
)
from twotower.demo.tokenizer import EOS_ID, MASK_ID, encode_answer
from twotower.model.cache import TowerCache
from twotower.model.tower import ContextTower, DenoiserTower

INSTANCES = [
    Instance("words", "words: 7\n", "seven"),
    Instance("long", "a longer prompt, with many more tokens than the first\n", "red blue " * 12),
    Instance("middle", "reverse: red blue\n", "one thousand two hundred and thirty-six, and some more"),
]


@pytest.fixture(scope="module")
def towers(tiny_config: dict[str, Any]) -> tuple[ContextTower, DenoiserTower]:
    generator = torch.Generator().manual_seed(0)
    context = new_context_tower(ModelConfig.from_dict(tiny_config), generator)
    denoiser = new_denoiser_tower(context, generator)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return context, denoiser


@pytest.fixture(scope="module")
def batch(tokenizer: BpeTokenizer) -> BlockBatch:
    return block_batch(tokenizer, INSTANCES)


def test_blocks_start_at_the_answer_and_end_in_eos(batch: BlockBatch, tokenizer: BpeTokenizer) -> None:
    assert batch.num_blocks_R.tolist() == sorted(batch.num_blocks_R.tolist(), reverse=True)
    seven = batch.answers_RZW[-1, 0].tolist()
    eos = seven.index(EOS_ID)
    assert tokenizer.decode(seven[:eos]) == "seven"
    assert set(seven[eos:]) == {EOS_ID}
    assert (batch.num_blocks_R[0] - 1) * 16 < (batch.answers_RZW[0] != EOS_ID).sum() + 1


def test_every_fourth_prompt_leaves_its_line_break_to_the_answer(tokenizer: BpeTokenizer) -> None:
    (line_break,) = tokenizer.encode("\n", add_special_tokens=False).ids
    batch = block_batch(tokenizer, INSTANCES[:1] * 4)
    assert (batch.answers_RZW[:, 0, 0] == line_break).sum() == 1
    last_R = batch.prompts_RP[torch.arange(4), batch.lengths_R - 1]
    assert (last_R == line_break).sum() == 3


@torch.no_grad()
def test_rows_of_like_length_in_one_batch_do_not_change_the_loss(
    towers: tuple[ContextTower, DenoiserTower], tokenizer: BpeTokenizer
) -> None:
    context, _ = towers
    apart = [causal_batches(tokenizer, [instance])[0] for instance in INSTANCES * 2]
    wanted = [int((batch.targets_RL != IGNORED).sum()) for batch in apart]
    losses = [float(context_loss(context, [batch])) * count for batch, count in zip(apart, wanted, strict=True)]
    together = context_loss(context, causal_batches(tokenizer, INSTANCES * 2))
    assert float(together) == pytest.approx(sum(losses) / sum(wanted), rel=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_training_forward_equals_the_serving_pass(
    towers: tuple[ContextTower, DenoiserTower], batch: BlockBatch
) -> None:
    context, denoiser = towers
    reading = read_batch(context, batch)
    generator = torch.Generator().manual_seed(1)
    pairs = [(row, block) for row, count in enumerate(batch.num_blocks_R.tolist()) for block in range(count)]
    assert max(block for _, block in pairs) >= 2, "the test wants a third block"
    rows_B, blocks_B = torch.tensor(pairs).T
    truth_BW = batch.answers_RZW[rows_B, blocks_B]
    mask_BW = draw_masks(*truth_BW.shape, generator)
    in_training = masked_logits(denoiser, reading, rows_B, blocks_B, truth_BW, mask_BW).split(mask_BW.sum(1).tolist())
    for (row, block), mask_W, trained in zip(pairs, mask_BW, in_training, strict=True):
        served_WV = _serve_one(context, denoiser, batch, row, block, mask_W)
        served_WV[:, MASK_ID] = -1e12
        torch.testing.assert_close(trained, served_WV[mask_W], rtol=0, atol=1e-4)


def _serve_one(
    context: ContextTower, denoiser: DenoiserTower, batch: BlockBatch, row: int, block: int, mask_W: Tensor
) -> Tensor:
    """Logits [W,V] of one step as the engines compute it: alone, from the paged cache, prompt then block by block."""
    cache = TowerCache(context.config, slots=2, pages=64, device=context.device, dtype=torch.float32)
    prompt_S = batch.prompts_RP[row, : batch.lengths_R[row]]
    slot = cache.allocate(len(prompt_S) + 16 * (block + 1))
    for piece_L in [prompt_S, *batch.answers_RZW[row, :block]]:
        context(piece_L[None], cache.extending([slot], [len(piece_L)], len(piece_L)))
        cache.advance(slot, len(piece_L))
    seen_W = batch.answers_RZW[row, block].masked_fill(mask_W, MASK_ID)
    t_1 = mask_W.sum()[None] / len(mask_W)
    hidden_1WD = denoiser(seen_W[None], cache.reading([slot], [len(seen_W)], len(seen_W)), t_1)
    return denoiser.logits(hidden_1WD)[0]


@torch.no_grad()
@pytest.mark.slow
def test_a_new_denoiser_predicts_as_the_tower_it_copies(towers: tuple[ContextTower, DenoiserTower]) -> None:
    context, _ = towers
    denoiser = new_denoiser_tower(context, torch.Generator().manual_seed(2))
    tokens_1L = torch.arange(4, 5)[None]
    cache = TowerCache(context.config, slots=2, pages=4, device=context.device, dtype=torch.float32)
    slot = cache.allocate(16)
    for t in (None, torch.tensor([0.5])):
        copied = denoiser(tokens_1L, cache.reading([slot], [1], 1), t)
        torch.testing.assert_close(copied, context(tokens_1L, cache.reading([slot], [1], 1)))


def test_masks_cover_every_count_and_favour_the_full_one() -> None:
    counts = draw_masks(4000, 16, torch.Generator().manual_seed(0)).sum(1)
    assert set(counts.tolist()) == set(range(1, 17))
    assert 0.2 < (counts == 16).float().mean() < 0.3


def test_half_of_the_masks_hide_the_end_of_the_block() -> None:
    masks_BW = draw_masks(4000, 16, torch.Generator().manual_seed(1))
    partial_BW = masks_BW[(masks_BW.sum(1) > 1) & (masks_BW.sum(1) < 15)]
    ends = (partial_BW[:, 1:] >= partial_BW[:, :-1]).all(1)  # once hidden, hidden to the end
    assert 0.45 < ends.float().mean() < 0.6


def test_a_later_mask_is_what_unmasking_by_confidence_leaves() -> None:
    generator = torch.Generator().manual_seed(2)
    mask_BW = draw_masks(4000, 16, generator)
    confidence_BW = torch.rand(4000, 16, generator=generator)
    later_BW = later_masks(mask_BW, confidence_BW, generator)
    counts_B, left_B = mask_BW.sum(1), later_BW.sum(1)
    assert not (later_BW & ~mask_BW).any(), "nothing is masked again"
    assert (left_B >= 1).all() and (left_B < counts_B)[counts_B > 1].all()
    assert set(left_B[counts_B == 16].tolist()) == set(range(1, 15))
    unmasked_BW = mask_BW & ~later_BW
    least_B = confidence_BW.masked_fill(~unmasked_BW, 2).amin(1)
    most_B = confidence_BW.masked_fill(~later_BW, -1).amax(1)
    assert (least_B > most_B).all()


def test_both_losses_reach_every_weight(
    towers: tuple[ContextTower, DenoiserTower], batch: BlockBatch, tokenizer: BpeTokenizer
) -> None:
    context, denoiser = towers
    context_loss(context, causal_batches(tokenizer, INSTANCES)).backward()
    denoiser_loss(context, denoiser, batch, torch.Generator().manual_seed(0)).backward()
    for tower in towers:
        assert not [n for n, p in tower.named_parameters() if p.grad is None or not p.grad.abs().sum()]


def test_mock_ar_is_trained_on_what_it_is_shown_when_served(
    towers: tuple[ContextTower, DenoiserTower], tokenizer: BpeTokenizer
) -> None:
    """The loss equals the cross-entropy of mock-AR's own logits over the paged cache, row by row."""
    context, denoiser = towers
    batch = next_token_batch(tokenizer, INSTANCES, torch.Generator().manual_seed(3))
    losses = []
    with torch.no_grad():
        for before_L, length, newest, target in zip(*vars(batch).values(), strict=True):
            cache = TowerCache(context.config, slots=2, pages=64, device=context.device, dtype=torch.float32)
            slot = cache.allocate(len(before_L) + 16)
            context(before_L[None, :length], cache.extending([slot], [int(length)], int(length)))
            cache.advance(slot, int(length))
            hidden_11D = denoiser(newest[None, None], cache.reading([slot], [1], 1), None)
            losses.append(F.cross_entropy(denoiser.logits(hidden_11D)[0], target[None]))
    torch.testing.assert_close(mock_ar_loss(context, denoiser, batch).detach(), torch.stack(losses).mean())


def test_every_target_of_a_row_is_drawn(tokenizer: BpeTokenizer) -> None:
    """The line break, each token of the answer and eos; never a token of the prompt."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([next_token_batch(tokenizer, INSTANCES[:1] * 8, generator).targets_R for _ in range(20)])
    line_break = tokenizer.encode("\n", add_special_tokens=False).ids
    assert set(drawn.tolist()) == {*line_break, *encode_answer(tokenizer, INSTANCES[0].answer)}
