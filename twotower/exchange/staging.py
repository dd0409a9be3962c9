"""The flat byte buffers in which deltas are sent, and the layout of a delta's tensors in a buffer.

Packing happens on the engine's thread and compute stream, so that no forward pass can overtake it. Knows nothing of the
transport.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias, cast

import torch
from torch import Tensor

from twotower.exchange.protocol import Delta
from twotower.exchange.settings import LinkSettings
from twotower.model.cache import Span, TowerCache
from twotower.model.scaled import TOPS, Scaled
from twotower.model.transfer import fence_on

_ALIGNMENT = 16  # a view as another dtype must start at a multiple of its size
_USUAL_BLOCK, _USUAL_DELTAS, _LEAST_BYTES = 16, 4, 8 << 20
_SSM = 3  # its place among a delta's tensors: keys, values, conv, ssm; then, where those have any, their scales
_MOST_VIEWS, _MOST_LAYOUTS = 64, 1024  # kept by a buffer, by a layout

Shapes: TypeAlias = tuple[tuple[torch.Size, torch.dtype], ...]


class StagingBuffer:
    """`flat` bytes beside the cache; `wire` is what the data group carries: pinned host memory, or `flat` itself.

    `fence` is the event after which the compute stream no longer touches `flat`; None on a CPU.
    """

    def __init__(self, nbytes: int, device: torch.device, through_host: bool) -> None:
        self._device, self._through_host = device, through_host
        self._allocate(nbytes)

    def grow(self, nbytes: int) -> None:
        """Make room for at least `nbytes`; the old content is lost. Buffers sized by `fitted` never need to grow."""
        if nbytes > self.flat.numel():
            self._allocate(nbytes)

    def mark(self) -> None:
        """Note that no later work on the compute stream touches this buffer."""
        self.fence: torch.cuda.Event | None = fence_on(self._device)

    def views(self, shapes: Shapes) -> list[Tensor]:
        """Tensors of these shapes, one after the other in `flat`. They are cached, because most messages repeat an
        earlier layout.
        """
        if shapes not in self._views:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            offset, views = 0, []
            for shape, dtype in shapes:
                length = _nbytes(shape, dtype)
                views.append(self.flat[offset : offset + length].view(dtype).view(shape))
                offset += _aligned(length)
            self._views[shapes] = views
        return self._views[shapes]

    def _allocate(self, nbytes: int) -> None:
        self._views: dict[Shapes, list[Tensor]] = {}
        self.flat = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        staged = self._through_host and self._device.type == "cuda"
        self.wire = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if staged else self.flat
        # The allocator hands out memory for the calling thread's compute stream, whose earlier work may still touch it:
        # the link's stream waits for that work. Waiting for the device instead would break another thread's capture.
        self.mark()


def fitted(settings: LinkSettings, cache: TowerCache, longest_delta: int) -> LinkSettings:
    """Settings with buffers for a few committed blocks of this cache (blocks committed together are mostly sent
    together), and for a delta of `longest_delta` positions.
    """
    layout = DeltaLayout(cache, settings.ssm_wire_dtype)
    block, longest = (layout.nbytes([Delta(0, 0, length, 0)]) for length in (_USUAL_BLOCK, longest_delta))
    return replace(settings, staging_bytes=max(_LEAST_BYTES, _USUAL_DELTAS * block, longest))


class StagingPool:
    """A few buffers. `take` and `give` are called from different threads (a deque's ends are thread-safe)."""

    def __init__(self, count: int, nbytes: int, device: torch.device, through_host: bool) -> None:
        self._free = deque(StagingBuffer(nbytes, device, through_host) for _ in range(count))

    def take(self) -> StagingBuffer | None:
        try:
            return self._free.popleft()
        except IndexError:
            return None

    def give(self, buffer: StagingBuffer) -> None:
        self._free.append(buffer)


class DeltaLayout:
    """The layout of deltas that are sent together in a buffer, for caches of this shape.

    All keys first, then all values, conv windows and SSM states: four copies pack or apply any number of deltas. SSM
    states in 8 bits are followed by their scales, and take a few operations more.
    """

    def __init__(self, cache: TowerCache, ssm_wire_dtype: str) -> None:
        self._cache = cache
        self._ssm_dtype: torch.dtype = getattr(torch, ssm_wire_dtype)
        self._known: dict[tuple[int, int], tuple[Shapes, int]] = {}

    @property
    def fingerprint(self) -> str:
        """Equal if two caches can exchange deltas."""
        shapes, _ = self._layout(1, 1)
        return " ".join(f"{dtype}{list(shape)}" for shape, dtype in shapes)

    def nbytes(self, deltas: Sequence[Delta]) -> int:
        """Bytes on the wire; never 0, because the data group carries no empty message."""
        return self._of(deltas)[1]

    def pack(self, deltas: Sequence[Delta], buffer: StagingBuffer) -> None:
        """Copy the deltas' tensors out of the cache."""
        self._cache.copy_delta([span_of(delta) for delta in deltas], self.views(deltas, buffer))

    def views(self, deltas: Sequence[Delta], buffer: StagingBuffer) -> list[Tensor | Scaled]:
        """The tensors of `TowerCache.delta`, as views of the buffer."""
        views: list[Tensor | Scaled] = [*buffer.views(self._of(deltas)[0])]
        if self._ssm_dtype in TOPS:
            numbers, scales = cast(list[Tensor], views[_SSM:])
            views[_SSM:] = [Scaled(numbers, scales)]
        return views

    def _of(self, deltas: Sequence[Delta]) -> tuple[Shapes, int]:
        return self._layout(sum(d.end - d.start for d in deltas), sum(d.complete for d in deltas))

    def _layout(self, tokens: int, states: int) -> tuple[Shapes, int]:
        """Shapes and bytes of deltas that bring so many positions and Mamba states together."""
        known = self._known.get((tokens, states))
        if known is None:
            *others, (ssm, own) = self._cache.delta_shapes(tokens, states)
            scales = [(ssm[:-1], own)] if self._ssm_dtype in TOPS else []
            shapes = (*others, (ssm, self._ssm_dtype), *scales)
            known = shapes, max(sum(_aligned(_nbytes(*each)) for each in shapes), _ALIGNMENT)
            if len(self._known) < _MOST_LAYOUTS:
                self._known[tokens, states] = known
        return known


def span_of(delta: Delta) -> Span:
    """The part of the context tower's cache that a delta carries."""
    return Span(delta.slot, delta.start, delta.end, delta.complete)


def _nbytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
