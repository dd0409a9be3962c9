"""How big a pair's engines are and how patient. Chosen by whoever deploys, never changed while running."""

from dataclasses import dataclass

from twotower.model.pages import pages_for
from twotower.validation import MAX_BLOCK


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Sizes in sequences and tokens, times in seconds.

    `cache_tokens` 0 means: room for `max_sequences` sequences of the longest length. `link_timeout_s` is how long a
    tower process may be silent, `stall_timeout_s` how long one tick may take, `start_timeout_s` how long loading may.
    `capture`: auto, on or off (`engine/capture.py`).
    """

    max_sequences: int = 32
    max_sequence_length: int = 4096
    cache_tokens: int = 0
    prefill_chunk_tokens: int = 512
    link_timeout_s: float = 10.0
    stall_timeout_s: float = 60.0
    start_timeout_s: float = 600.0
    max_queued_requests: int = 64
    capture: str = "auto"

    @property
    def longest_delta(self) -> int:
        """Positions that one cache delta brings at most: a prompt's chunk or a block."""
        return min(max(self.prefill_chunk_tokens, MAX_BLOCK), self.max_sequence_length)

    @property
    def pages(self) -> int:
        """KV pages of each tower's cache."""
        return pages_for(self.cache_tokens or self.max_sequences * self.max_sequence_length)
