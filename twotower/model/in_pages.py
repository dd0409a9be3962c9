"""Keys and values in a cache's pages, as kernels take them that read pages in place.

Letters as in `twotower.model.states`; besides, Z pages (of the memory, or of a row's table) and K positions of a page.
"""

from typing import NamedTuple

from torch import Tensor

# flash-attn's kernels of paged memory, which torch has too, walk it in tiles that divide this, and refuse other pages.
PLACES_OF_A_TABLE = 256


class Own(NamedTuple):
    """Keys and values [R,L,S,E] of a block that is only looked at, and how many of each row are real (int32)."""

    keys: Tensor
    values: Tensor
    lengths_R: Tensor


class InPages(NamedTuple):
    """What the new positions of a pass attend to in one layer.

    `keys` and `values` are all pages of the layer [Z,K,S,E]; `table_RZ` (int32) names those of each row, in the order
    of its positions. `ends_R` (int32): how many of a row's positions are seen.

    Without `own`, the pages hold the pass's new positions too, and attention is causal. The last of L positions sees
    `ends_R` positions, each one before it one fewer. With `own`, all new positions see `ends_R` positions, which may be
    0, and the block's real ones. The pages are not written to.
    """

    keys: Tensor
    values: Tensor
    table_RZ: Tensor
    ends_R: Tensor
    own: Own | None = None


def readable_in_place(page_tokens: int) -> bool:
    """Whether pages of so many positions can be read where they lie."""
    return page_tokens % PLACES_OF_A_TABLE == 0
