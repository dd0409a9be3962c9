"""How many positions a KV page holds. Pure Python, so that ledger and scheduler need no torch to count.

A page is the unit in which a cache hands out room and shares prefixes. It is no unit of the wire: deltas are counted in
positions, so two caches that exchange them may have pages of different sizes.
"""

PAGE_TOKENS = 16
# On CUDA. flash-attn reads pages where they lie if they hold a multiple of 256 positions. That is 1.5 MiB of the 30B's
# keys and values; a sequence has 47 MiB of Mamba states besides.
CUDA_PAGE_TOKENS = 256

ZERO_PAGE = 0  # read where a row has no page. Always zero: a masked weight of 0 must never meet a NaN.
WASTE_PAGE = 1  # written where a row has padding, never seen
RESERVED_PAGES = 2


def page_tokens_on(device_kind: str) -> int:
    """Positions that a page holds on `cpu` or `cuda`. The cell's ledger and its towers both go by it."""
    return CUDA_PAGE_TOKENS if device_kind == "cuda" else PAGE_TOKENS


def pages_for(tokens: int, page_tokens: int = PAGE_TOKENS) -> int:
    """Pages that hold `tokens` positions."""
    return -(-tokens // page_tokens)
