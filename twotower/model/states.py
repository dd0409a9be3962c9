"""A tower's interface to the sequences' states while it reads new tokens.

Shape suffixes, here and in the whole package: R rows (sequences), L new positions, T cached + new positions,
D hidden, C conv channels, K conv window, H heads, S key/value heads, E head width, P Mamba head width,
N SSM state, G Mamba groups, V vocabulary.
"""

from typing import Protocol

from torch import Tensor

from twotower.model.in_pages import InPages
from twotower.model.rescan import Keeps


class Reach(Protocol):
    """Which keys the new positions of a pass attend to, as a mask and, if possible, as numbers.

    `lengths_R` holds how many of the L positions of each row are real. The rest, on the right, is padding: its output
    is undefined, and it leaves no trace in any state. None: every position is real. `mask_RLT` is True where a new
    position may attend to a key. `updates` is False for passes that only read (the denoiser's). `starts_R` describes
    the mask of real positions for kernels that take no mask. With `updates`, position i sees the first `starts_R` + i +
    1 of the T keys, and T is at least `starts_R` + L. Without, each position sees the first `starts_R` keys and the
    row's own real keys, which are the first of the last L. None: only the mask describes it.
    """

    lengths_R: Tensor | None
    starts_R: Tensor | None
    updates: bool

    @property
    def mask_RLT(self) -> Tensor: ...


class WithoutPages:
    """Base of states whose keys and values lie in no pages."""

    def in_pages(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> None:
        return None


class LayerStates(Reach, Protocol):
    """The state of R sequences, layer by layer, as one forward pass sees and changes it."""

    @property
    def kept(self) -> Keeps | None:
        """Where each Mamba layer of a pass saves its scan's inputs, for `twotower.model.rescan`. Such a pass puts no
        Mamba state. None: scans are not kept.
        """
        ...

    def mamba(self, layer: int) -> tuple[Tensor, Tensor]:
        """Conv window [R,K,C] (newest last) and SSM state [R,H,P,N] (fp32) that seed this Mamba layer."""
        ...

    def put_mamba(self, layer: int, conv_RKC: Tensor, ssm_RHPN: Tensor) -> None:
        """Keep the state after the new positions. Called only with `updates`."""
        ...

    def keys_values(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values [R,T,S,E] this attention layer may look at, the new ones included and finite throughout.

        A pass with `starts_R` and without `updates` gives new tensors, which the caller may overwrite.
        """
        ...

    def in_pages(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> InPages | None:
        """Instead of `keys_values`: where they lie, for kernels that read pages in place. None, and nothing is done,
        where there are no such pages."""
        ...
