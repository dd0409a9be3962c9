"""GPUs that are none: tensors that say they are on `cuda:N` and compute on the CPU; a `torch.cuda` with CUDA's rules.

What on a real GPU fails late, or only sometimes, is an AssertionError here: a device without an index, operands on two
devices; a capture while serving, on another device's stream or on a second one of its pool, or that reads the host's
memory or lets the host wait. Waits for a whole device are counted, and uploads by a thread whose current device is
another one.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
_ATEN = torch.ops.aten
_MOVES = {"_to_copy", "to", "copy_", "_copy_from", "is_pinned", "_pin_memory"}
_WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2"}


def indexed(device: Any) -> torch.device:
    found: torch.device = torch.device(device)
    assert found.type != "cuda" or found.index is not None, "a CUDA device without an index"
    return found


class GpuTensor(torch.Tensor):
    """`inner` on the CPU holds the numbers. Overridden are those methods that torch binds past its dispatcher."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> "GpuTensor":
        # torch's bookkeeping of views wants this of what it wraps; what may be written to when, `inner` decides.
        with torch.inference_mode(False):
            tensor: GpuTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=device,
            )
        tensor.inner = inner
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"{self.device} {self.inner}"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operation, args, kwargs or {})

    def __getitem__(self, places: Any) -> Any:
        return GpuTensor(self.inner[_inner(places)], self.device)

    def __setitem__(self, places: Any, value: Any) -> None:
        self.inner[_inner(places)] = _inner(value)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Any:
        return _compute(_ATEN.copy_.default, (self, source), {})

    def contiguous(self, **_: Any) -> Any:
        if self.is_contiguous():
            return self
        return _compute(_ATEN.clone.default, (self,), {"memory_format": torch.contiguous_format})

    def __invert__(self) -> Any:
        return _compute(_ATEN.bitwise_not.default, (self,), {})

    def tolist(self) -> Any:
        return self._read().tolist()

    def item(self) -> Any:
        return self._read().item()

    def __float__(self) -> float:
        return float(self._read())

    def __int__(self) -> int:
        return int(self._read())

    def __bool__(self) -> bool:
        return bool(self._read())

    def _read(self) -> torch.Tensor:
        assert GPUS.recording() is None, "a capture that lets the host wait"
        return self.inner


def _inner(values: Any) -> Any:
    return tree_map(lambda leaf: leaf.inner if isinstance(leaf, GpuTensor) else leaf, values)


def _compute(operation: Any, args: Any, kwargs: Any) -> Any:
    name = operation.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    named = None if kwargs.get("device") is None else indexed(kwargs["device"])
    devices = {tensor.device for tensor in tensors if isinstance(tensor, GpuTensor) or tensor.dim()}
    moves = name in _MOVES
    assert moves or len(devices) <= 1, f"{name}: operands on {devices}"
    gpus = [tensor.device for tensor in tensors if isinstance(tensor, GpuTensor)]
    target = named or (gpus[0] if gpus else CPU)
    if name == "copy_" and not isinstance(args[0], GpuTensor):
        target = CPU
    if moves and target.type == "cuda" and CPU in devices:
        GPUS.has_uploaded(target)
    recording = GPUS.recording()
    waits = name in _WAITS or (name == "_grouped_mm" and not _has_kernel(args[0]))
    assert recording is None or not waits, f"{name}: a capture that lets the host wait"
    assert recording is None or not (moves and len(devices | {target}) > 1), f"{name}: a capture that reads the host"
    args, kwargs = _inner(args), _inner(kwargs) | {key: None for key in ("pin_memory",) if key in kwargs}
    if named is not None:
        kwargs["device"] = CPU
    out = operation(*args, **kwargs)
    if recording is not None:
        recording.append((operation, args, kwargs, out))
    if target.type != "cuda":
        return out
    known = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, GpuTensor)}

    def on_gpu(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, GpuTensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else GpuTensor(leaf, target)

    return tree_map(on_gpu, out)


def _has_kernel(tensor: torch.Tensor) -> bool:
    """torch's grouped products are a loop of the host's elsewhere."""
    return tensor.dtype is torch.bfloat16 and GPUS.capability[0] in (9, 10)


class _Mode(TorchDispatchMode):
    """Brings what creates tensors here."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operation, args, kwargs or {})


class Stream:
    def __init__(self, device: Any) -> None:
        self.device = indexed(device)
        GPUS.streams.append(self.device)

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: "Event") -> None:
        assert event.recorded is not None


class Event:
    """Work ends at once here, so an event has happened as soon as it is recorded."""

    def __init__(self, **_: Any) -> None:
        self.recorded: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.recorded = stream

    def query(self) -> bool:
        return self.recorded is not None

    def synchronize(self) -> None:
        assert GPUS.recording() is None, "a capture that lets the host wait"


class CUDAGraph:
    """Runs the captured operations anew, on the tensors they were captured with."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        GPUS.replays += 1
        for operation, args, kwargs, before in self.operations:
            given = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, kwargs))}
            for old, new in zip(_tensors(before), _tensors(operation(*args, **kwargs)), strict=True):
                if new.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Gpus:
    """The machine, and what this process did to it. `serving`: from now on nothing may be captured."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.serving = False
        self.captures = self.replays = self.device_waits = self.uploads = self.foreign_uploads = 0
        self.capability = (9, 0)
        self.pools: dict[object, Stream] = {}
        self.free = {index: 80 << 30 for index in range(count)}
        self.streams: list[torch.device] = []
        self._own = threading.local()

    @property
    def device(self) -> int:
        """The calling thread's."""
        return getattr(self._own, "device", 0)

    @property
    def stream(self) -> Stream | None:
        """The calling thread's; None is the default one."""
        return getattr(self._own, "stream", None)

    def recording(self) -> list[Any] | None:
        """What the calling thread captures."""
        return getattr(self._own, "operations", None)

    def has_uploaded(self, target: torch.device) -> None:
        self.uploads += 1
        self.foreign_uploads += target.index != self.device

    @contextmanager
    def on(self, device: Any) -> Iterator[None]:
        with self._set("device", indexed(device).index):
            yield

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        with self._set("device", stream.device.index), self._set("stream", stream):
            yield

    @contextmanager
    def capture(
        self, graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        assert not self.serving, "a capture while serving"
        assert stream is not None, "a stream of whichever device captured first"
        assert pool is not None, "memory of its own for every capture"
        assert self.pools.setdefault(pool, stream) is stream, "a stream gets no free block of another's"
        assert capture_error_mode == "thread_local", "other threads use CUDA meanwhile"
        self.captures += 1
        with self.within(stream), self._set("operations", graph.operations):
            yield

    def synchronize(self, device: Any = None) -> None:
        self.device_waits += 1

    def stream_of(self, device: Any) -> Stream:
        current = self.stream
        return current if current is not None and current.device == indexed(device) else Stream(device)

    @contextmanager
    def _set(self, name: str, value: Any) -> Iterator[None]:
        before = getattr(self._own, name, None)
        setattr(self._own, name, value)
        try:
            yield
        finally:
            if before is None:
                delattr(self._own, name)
            else:
                setattr(self._own, name, before)


GPUS = Gpus(0)


@contextmanager
def gpus(count: int, patch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """Let torch see so many GPUs, on the calling thread and on those that start meanwhile."""
    global GPUS
    GPUS = machine = Gpus(count)
    tensor, generator, run = torch.tensor, torch.Generator, threading.Thread.run

    def new_tensor(values: Any, pin_memory: bool = False, device: Any = CPU, **others: Any) -> torch.Tensor:
        made = tensor(values, **others)
        return made if device is None else made.to(indexed(device))

    class NewGenerator(generator):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = CPU) -> Any:
            assert indexed(device)
            return generator(CPU)

    def run_in_mode(thread: threading.Thread) -> None:
        with _Mode():
            run(thread)

    patch.setattr(torch, "tensor", new_tensor)
    patch.setattr(torch, "Generator", NewGenerator)
    patch.setattr(threading.Thread, "run", run_in_mode)
    replaced = dict(
        _lazy_init=lambda: None,
        is_available=lambda: True,
        device_count=lambda: machine.count,
        current_device=lambda: machine.device,
        device=machine.on,
        Stream=Stream,
        Event=Event,
        CUDAGraph=CUDAGraph,
        graph=machine.capture,
        graph_pool_handle=object,
        stream=machine.within,
        current_stream=machine.stream_of,
        synchronize=machine.synchronize,
        mem_get_info=lambda device: (machine.free[indexed(device).index], 80 << 30),
        memory_reserved=lambda device: indexed(device).index,
        memory_allocated=lambda device: indexed(device).index,
        get_device_capability=lambda device: machine.capability,
        get_device_properties=lambda device: SimpleNamespace(uuid=f"GPU-{indexed(device).index}"),
    )
    for name, value in replaced.items():
        patch.setattr(torch.cuda, name, value)
    with _Mode():
        yield machine
