"""Which implementation makes guesses for a tower: the plain functions, or on CUDA the Triton kernel if it agrees with
them on that device. `twotower.model.kernels.choice` chooses the towers' kernels in the same way.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from twotower.config import MASK_TOKEN_ID
from twotower.decoding.guesses import Draw, drawn, likeliest
from twotower.decoding.randomness import step_key
from twotower.model.tower import ContextTower, DenoiserTower

logger = logging.getLogger(__name__)

Guess = Callable[[Tensor, int, Draw | None], Tensor]
"""Guesses [P,4] from logits [P,V], the mask token's id, and how positions are drawn; None: they are the likeliest.
Only `plain` has to know of bounds: `unmask_at` gives the others no draw that is bounded."""

TOLERANCE = 1e-3  # of confidences, ratios and sums, whose largest are 1; tokens of these inputs are no near-ties
_POSITIONS = 5
_LEAST_APART = 1e-3


def plain(logits_PV: Tensor, mask_token_id: int, draw: Draw | None) -> Tensor:
    """In fp32. Overwrites the mask token's logits."""
    return likeliest(logits_PV, mask_token_id) if draw is None else drawn(logits_PV, mask_token_id, draw)


def guess_of(tower: ContextTower | DenoiserTower) -> Guess:
    """The implementation for a tower's logits. The first call adds it to the tower's description."""
    if tower.device.type != "cuda" or tower.plain_only:
        return plain
    guess, how = _chosen(tower.config.vocab_size, tower.device, tower.dtype)
    if "guesses:" not in tower.kernels:
        tower.kernels += f"; guesses: {how}"
        logger.info("guesses: %s", how)
    return guess


@cache
def _chosen(vocab: int, device: torch.device, dtype: torch.dtype) -> tuple[Guess, str]:
    """Once a process: it compiles the kernel and compares it."""
    return choose(vocab, device, dtype)


@torch.inference_mode()
def choose(
    vocab: int, device: torch.device, dtype: torch.dtype, load: Callable[[str], ModuleType] = importlib.import_module
) -> tuple[Guess, str]:
    """The implementation on CUDA for logits of this dtype, and the reason in words."""
    try:
        guess: Guess = load("twotower.decoding.fused_guesses").guess
        case, worst = max(deviations(guess, vocab, device, dtype), key=lambda deviation: deviation[1])
    except Exception as error:  # a missing compiler fails in many ways
        logger.warning("guesses: triton does not run here", exc_info=True)
        return plain, f"torch (triton failed: {type(error).__name__})"
    if worst > TOLERANCE:
        logger.warning("guesses: triton differs from torch by %.1e in %s", worst, case)
        return plain, f"torch (triton differs from torch by {worst:.1e} in {case})"
    return guess, "triton (agrees with torch here)"


def deviations(guess: Guess, vocab: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Every case's name and deviation, for random logits. A different token counts as an infinite deviation, unless it
    was a near-tie.
    """
    random = torch.Generator(device).manual_seed(1)
    keys = [step_key(number, 3, number) for number in range(_POSITIONS)]
    cases: dict[str, Draw | None] = {
        "likeliest": None,
        "drawn": Draw([1e-3, 0.3, 0.7, 1.0, 4.0], keys, [0, 3, 9, 15, 2]),
    }
    for name, draw in cases.items():
        logits_PV = (4 * torch.randn(_POSITIONS, vocab, generator=random, device=device)).to(dtype)
        logits_PV[0, MASK_TOKEN_ID] = 50.0  # never the answer
        wanted_P4 = plain(logits_PV.to(torch.float32, copy=True), MASK_TOKEN_ID, draw)
        got_P4 = guess(logits_PV, MASK_TOKEN_ID, draw)
        other_P = (got_P4[:, 0] != wanted_P4[:, 0]) & (wanted_P4[:, 2] < 1 - _LEAST_APART)
        yield f"{name}: tokens", torch.inf if bool(other_P.any()) else 0.0
        same_P1 = (got_P4[:, :1] == wanted_P4[:, :1]).float()
        off_P3 = (got_P4[:, 1:] - wanted_P4[:, 1:]).abs() * same_P1
        sums_P = off_P3[:, 2] / logits_PV.float().abs().sum(1)
        yield f"{name}: confidence", _largest(off_P3[:, 0])
        yield f"{name}: ratio", _largest(off_P3[:, 1])
        yield f"{name}: sum", _largest(sums_P)
        logits_PV[1, vocab - 1] = torch.inf
        logits_PV[2, 1] = torch.nan
        finite_P = guess(logits_PV, MASK_TOKEN_ID, draw)[:, 3].isfinite().tolist()
        yield f"{name}: what is not finite", 0.0 if finite_P == [True, False, False, True, True] else torch.inf


def _largest(off_P: Tensor) -> float:
    return float(off_P.max().nan_to_num(torch.inf))
