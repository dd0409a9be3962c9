"""Bytes that our own code moves in a denoiser step beyond the minimum of `passes`, on CUDA, in bf16. They are computed
from the launched kernels: each tensor is read once and written once. Nothing here is measured.

Of attention: a kernel reads pages where they lie, in two calls whose results are mixed. Without one a row's pages are
gathered into one tensor; all rows are counted as equally long, though they are padded to the longest. Of Mamba layers:
the rows' states are gathered likewise; one row's are a view. Of the decision: bytes of each logit, kernel by kernel
(`twotower.decoding.guesses`), or by the one kernel that reads what the head has written (`fused_guesses`).
"""

from __future__ import annotations

from dataclasses import dataclass

from twotower.config import ModelConfig
from twotower.planner.passes import Batch, Cost, kv_bytes, state_bytes

_BF16, _FP32 = 2, 4
_COUNTED = 8  # of a logit, in `passes`: once written, once read, in fp32
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
_GATHERED = 2  # written, and read by what uses it, beside the one read that counts
# Of each number of the queries or the result. Queries and the result are put into another order once. Queries are read
# once more. Two results are written and read, and become one.
_MIXED = 4 + 5
_SUMS = 8  # of a query head: two sums of weights, their difference and the share made of it, written and read


@dataclass(frozen=True, slots=True)
class Beside:
    """Bytes. `in_place`: of attention that reads pages in place. `pages` and `states`: what is gathered, pages only
    without that. Then the decision's: by the kernel, and by torch's functions where no row or every row samples. Fewer
    than counted are below 0."""

    in_place: float
    pages: float
    states: float
    fused: float
    greedy: float
    sampled: float

    def factors(self, cost: Cost) -> dict[str, float]:
        """All that a step moves, as so many times what it must: by the kernels, and by plain functions alone."""
        own = {
            "kernels": self.in_place + self.fused,
            "greedy": self.pages + self.greedy,
            "sampled": self.pages + self.sampled,
        }
        return {name: (cost.bytes + self.states + nbytes) / cost.bytes for name, nbytes in own.items()}


def beside(config: ModelConfig, batch: Batch) -> Beside:
    """The bytes of a step with half of each block masked."""
    logits = batch.positions / 2 * config.vocab_size
    states = _GATHERED * batch.rows * state_bytes(config) if batch.rows > 1 else 0
    pages = _GATHERED * batch.rows * (batch.context + batch.width) * kv_bytes(config)
    heads = len(config.layers_of("*")) * batch.positions * config.num_attention_heads
    in_place = heads * (_MIXED * config.head_dim * _BF16 + _SUMS * _FP32)
    return Beside(in_place, pages, states, *((nbytes - _COUNTED) * logits for nbytes in (FUSED, GREEDY, SAMPLED)))
