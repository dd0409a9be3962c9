"""The flat byte buffers in which deltas cross, and how a delta's tensors lie in one.

Packing and unpacking happen on the engine's thread and compute stream, so that no forward pass can overtake them.
Knows nothing of how the bytes cross.
"""

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.exchange.protocol import Delta
from twotower.model.cache import Span, TowerCache

_ALIGNMENT = 16  # a view as another dtype must start at a multiple of its size
_SSM = 3  # its place among a delta's tensors: keys, values, conv, ssm


class StagingBuffer:
    """`flat` bytes beside the cache; `wire` is what the data group carries: pinned host memory, or `flat` itself.

    `fence` is the event after which the compute stream no longer touches `flat`; None on a CPU.
    """

    def __init__(self, nbytes: int, device: torch.device, through_host: bool) -> None:
        self._device, self._through_host = device, through_host
        self.fence: torch.cuda.Event | None = None
        self._allocate(nbytes)

    def grow(self, nbytes: int) -> None:
        """Room for at least `nbytes`; what it held is lost."""
        if nbytes > self.flat.numel():
            self._allocate(nbytes)
            if self._device.type == "cuda":
                # Rare, and spares every later user the question which stream the new and old memory belong to.
                torch.cuda.synchronize(self._device)

    def mark(self) -> None:
        """The compute stream's work queued so far is the last that touches this buffer."""
        if self._device.type == "cuda":
            self.fence = torch.cuda.Event()
            self.fence.record(torch.cuda.current_stream(self._device))

    def _allocate(self, nbytes: int) -> None:
        self.flat = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        staged = self._through_host and self._device.type == "cuda"
        self.wire = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if staged else self.flat


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
    """Where the tensors of deltas that cross together lie in a buffer, for caches of this shape.

    All keys first, then all values, conv windows and SSM states: four copies pack or apply any number of deltas.
    """

    def __init__(self, cache: TowerCache, ssm_wire_dtype: str) -> None:
        self._cache = cache
        self._ssm_dtype: torch.dtype = getattr(torch, ssm_wire_dtype)

    @property
    def fingerprint(self) -> str:
        """Equal where two caches can exchange deltas."""
        return " ".join(f"{dtype}{list(shape)}" for shape, dtype in self._shapes([Span(0, 0, 1)]))

    def nbytes(self, deltas: Sequence[Delta]) -> int:
        """Bytes on the wire; never 0, because the data group carries no empty message."""
        shapes = self._shapes([span_of(delta) for delta in deltas])
        return max(sum(_aligned(_nbytes(shape, dtype)) for shape, dtype in shapes), _ALIGNMENT)

    def pack(self, deltas: Sequence[Delta], flat: Tensor) -> None:
        """Copy the deltas' tensors out of the cache."""
        self._cache.copy_delta([span_of(delta) for delta in deltas], self.views(deltas, flat))

    def views(self, deltas: Sequence[Delta], flat: Tensor) -> list[Tensor]:
        """The tensors of `TowerCache.delta`, as views of the buffer."""
        offset, views = 0, []
        for shape, dtype in self._shapes([span_of(delta) for delta in deltas]):
            length = _nbytes(shape, dtype)
            views.append(flat[offset : offset + length].view(dtype).view(shape))
            offset += _aligned(length)
        return views

    def _shapes(self, spans: Sequence[Span]) -> list[tuple[torch.Size, torch.dtype]]:
        shapes = self._cache.delta_shapes(spans)
        return [(shape, self._ssm_dtype if i == _SSM else dtype) for i, (shape, dtype) in enumerate(shapes)]


def span_of(delta: Delta) -> Span:
    """The part of the context tower's cache that a delta carries."""
    return Span(delta.slot, delta.start, delta.end, delta.complete)


def _nbytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
