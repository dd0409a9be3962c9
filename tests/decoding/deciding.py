"""A step's decision as the host gets to know it."""

from collections.abc import Sequence

from torch import Tensor

from twotower.decoding.unmasking import MASK_TOKEN_ID, Blocks, Decision, StepParams, unmask


def decide(
    logits_RLV: Tensor, blocks: Blocks, mask_token_id: int = MASK_TOKEN_ID, noise: Tensor | None = None
) -> list[Decision]:
    """Leaves the logits as they are."""
    outcome = unmask(logits_RLV.clone(), blocks, mask_token_id, noise).tolist()
    return [
        Decision(row, params, least) for row, params, least in zip(outcome, blocks.rows, blocks.at_least, strict=True)
    ]


def fresh(width: int, rows: Sequence[StepParams]) -> Blocks:
    """A block for each row, all of it masked."""
    return Blocks([[MASK_TOKEN_ID] * width for _ in rows], [[True] * width for _ in rows], rows)
