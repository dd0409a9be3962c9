"""Bytes that our own code moves in a denoiser step beyond the minimum of `passes`, on CUDA, in bf16. They are computed
from the launched kernels: each tensor is read once and written once. Nothing here is measured.

Attention: a row's pages are gathered into one tensor; all rows count as equally long, though they are padded to the
longest. Mamba layers: the rows' states are gathered likewise; a single row's states are a view. The decision: bytes of
each logit, kernel by kernel (`twotower.decoding.guesses`), or by the single kernel that reads the head's output
(`fused_guesses`).
"""

from __future__ import annotations

from dataclasses import dataclass

from twotower.config import ModelConfig
from twotower.planner.passes import Batch, Cost, kv_bytes, state_bytes

_COUNTED = 8  # bytes of a logit in `passes`: once written, once read, in fp32
_BOTH = {"head": 2, "to fp32": 6, "sum": 4, "softmax": 8, "largest": 4, "runner-up": 4}
# A round of the random numbers: a shift, a mask and a xor, and but for the last a product.
_ROUNDS = 2 * (3 * (8 + 8 + 12) + 2 * 8)
_DRAWN = {
    "at its temperature": 8,
    "log-softmax": 8,
    "random bits": 4 + _ROUNDS + 8,
    "bits to numbers": 4 * 8,
    "Gumbel": 5 * 8 + 12,
}
FUSED = 2 * 2
GREEDY = sum(_BOTH.values())
SAMPLED = GREEDY + sum(_DRAWN.values())
_GATHERED = 2  # written, and read by its user, beside the one read that counts


@dataclass(frozen=True, slots=True)
class Beside:
    """Bytes. `pages` and `states`: gathered. Then the decision's bytes: by the kernel, and by torch's functions if no
    row or every row samples. A negative number means fewer bytes than `passes` counts.
    """

    pages: float
    states: float
    fused: float
    greedy: float
    sampled: float

    def factors(self, cost: Cost) -> dict[str, float]:
        """All bytes that a step moves ÷ the bytes that it must move."""
        decided = {"fused": self.fused, "greedy": self.greedy, "sampled": self.sampled}
        return {name: (cost.bytes + self.pages + self.states + nbytes) / cost.bytes for name, nbytes in decided.items()}


def beside(config: ModelConfig, batch: Batch) -> Beside:
    """Of a step, with half of each block masked."""
    logits = batch.positions / 2 * config.vocab_size
    states = _GATHERED * batch.rows * state_bytes(config) if batch.rows > 1 else 0
    pages = _GATHERED * batch.rows * (batch.context + batch.width) * kv_bytes(config)
    return Beside(pages, states, *((nbytes - _COUNTED) * logits for nbytes in (FUSED, GREEDY, SAMPLED)))
