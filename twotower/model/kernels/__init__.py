"""Which implementation computes what: the one seam between the towers and faster kernels.

The plain torch functions live beside the mixers (`mamba.py`, `attention.py`, `moe.py`) and define what is right. What
is here replaces some of them on a GPU, and only after it has agreed with them on this very device.
"""

from twotower.model.kernels.choice import Choice, Kernels, choose, describe, install

__all__ = ["Choice", "Kernels", "choose", "describe", "install"]
