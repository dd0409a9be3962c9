"""Stand-in GPUs: tensors that say they are on `cuda:N` and compute on the CPU; a `torch.cuda` with CUDA's rules.

Faults that show late on a real GPU, or only sometimes, are an AssertionError here:
- a device without an index, or operands on two devices;
- a capture while serving, or on another device's stream, or on a second stream of its pool;
- a capture that reads the host's memory or lets the host wait;
- a touch of memory that nothing orders after another stream's (`tests/stream_order.py`).
Waits for a whole device are counted, and uploads by a thread whose current device is another one.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.dispatch_mode import DispatchMode
from tests.handed_over import kept
from tests.stream_order import Clock, Memory, Operand, Ordering, mapped, tensors_of, touched

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
    memory: Memory

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device, memory: Memory | None = None) -> "GpuTensor":
        """In memory of its own, on the current stream, where none is given."""
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
        tensor.memory = GPUS.new_memory(device) if memory is None else memory
        if memory is None:
            GPUS.touch(tensor, True, "allocation")
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"{self.device} {self.inner}"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operation, args, kwargs or {})

    def __getitem__(self, places: Any) -> Any:
        part = self.inner[_inner(places)]
        if part.untyped_storage().data_ptr() == self.inner.untyped_storage().data_ptr():
            return GpuTensor(part, self.device, self.memory)
        GPUS.touch(self, False, "getitem", _numpy(places))
        return GpuTensor(part, self.device)

    def __setitem__(self, places: Any, value: Any) -> None:
        GPUS.touch(self, True, "setitem", _numpy(places))
        if isinstance(value, GpuTensor):
            GPUS.touch(value, False, "setitem")
        self.inner[_inner(places)] = _inner(value)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Any:
        return _compute(_ATEN.copy_.default, (self, source, non_blocking), {})

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
        GPUS.touch(self, False, "host")
        GPUS.host_waits(self.device)
        return self.inner


def _numpy(places: Any) -> Any:
    return mapped(lambda index: index.numpy(), _inner(places))


def _inner(values: Any) -> Any:
    return mapped(lambda tensor: tensor.inner if isinstance(tensor, GpuTensor) else tensor, values)


def _compute(operation: Any, args: Any, kwargs: Any) -> Any:
    name = operation.overloadpacket.__name__
    tensors = list(tensors_of((args, kwargs)))
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
    if name == "_pin_memory":
        return GPUS.pin(args[0])
    at_once = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    if name == "copy_" and at_once and len(devices) > 1:
        [on_host] = [tensor for tensor in args[:2] if not isinstance(tensor, GpuTensor)]
        assert GPUS.is_pinned(on_host), "a copy that nobody waits for, and memory that is not pinned"
        assert on_host.is_contiguous(), "such a copy of memory in pieces goes by way of another"
    recording = GPUS.recording()
    waits = name in _WAITS or (name == "_grouped_mm" and not _has_kernel(args[0]))
    assert recording is None or not waits, f"{name}: a capture that lets the host wait"
    assert recording is None or not (moves and len(devices | {target}) > 1), f"{name}: a capture that reads the host"
    given, pinned = (args, kwargs), kwargs.get("pin_memory")
    args, kwargs = _inner(args), _inner(kwargs) | {key: None for key in ("pin_memory",) if key in kwargs}
    if named is not None:
        kwargs["device"] = CPU
    out = operation(*args, **kwargs)
    if pinned:
        GPUS.pinned.append(out)
    known = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, GpuTensor)}
    memories = {tensor.inner.untyped_storage().data_ptr(): tensor.memory for tensor in known.values()}

    def on_gpu(leaf: torch.Tensor) -> torch.Tensor:
        if id(leaf) in known:
            return known[id(leaf)]
        return GpuTensor(leaf, target, memories.get(leaf.untyped_storage().data_ptr()))

    shown = mapped(on_gpu, out) if target.type == "cuda" else out
    GPUS.touch_all(name, touched(operation, given, shown))
    if recording is not None:
        recording.append(((operation, args, kwargs, out), touched(operation, given, shown), shown))
    if gpus and (name in _WAITS or (moves and not at_once and CPU in devices | {target})):
        GPUS.host_waits(gpus[0])
    if target.type == "cuda" and moves and not at_once and CPU in devices:
        GPUS.host_waits(target)
    return shown


def _has_kernel(tensor: torch.Tensor) -> bool:
    """torch's grouped products are a loop of the host's elsewhere."""
    return tensor.dtype is torch.bfloat16 and GPUS.capability[0] in (9, 10)


class _Mode(DispatchMode):
    """Brings what creates tensors here."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operation, args, kwargs or {})


class Stream:
    """None waits for another unasked: torch's are all made non-blocking, and the default one is no exception."""

    def __init__(self, device: Any, name: str = "a stream of") -> None:
        self.device = indexed(device)
        self.number = GPUS.order.new_stream(f"{name} {self.device}")
        GPUS.streams.append(self.device)

    def wait_stream(self, other: "Stream") -> None:
        GPUS.order.waits(self.number, GPUS.order.queued(other.number))

    def wait_event(self, event: "Event") -> None:
        assert event.clock is not None, "an event that was not recorded"
        GPUS.order.waits(self.number, event.clock)


class Event:
    """Work ends at once here, so an event has happened as soon as it is recorded: whoever asks knows."""

    def __init__(self, **_: Any) -> None:
        self.clock: Clock | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.clock = GPUS.order.queued((stream or GPUS.stream_of(torch.device("cuda", GPUS.device))).number)

    def query(self) -> bool:
        if self.clock is not None:
            GPUS.order.host_waits(self.clock)
        return self.clock is not None

    def synchronize(self) -> None:
        assert GPUS.recording() is None, "a capture that lets the host wait"
        self.query()

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


class CUDAGraph:
    """Runs the captured operations anew, on the tensors they were captured with."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, list[Operand], Any]] = []
        self.memory: GpuTensor | None = None

    def replay(self) -> None:
        GPUS.replays += 1
        assert self.memory is not None, "a graph without a capture"
        GPUS.touch(self.memory, True, "a replay")
        for (operation, args, kwargs, before), operands, results in self.operations:
            GPUS.touch_all("a replay", operands)
            given = {leaf.untyped_storage().data_ptr() for leaf in tensors_of((args, kwargs))}
            for old, new in zip(tensors_of(before), tensors_of(operation(*args, **kwargs)), strict=True):
                if new.untyped_storage().data_ptr() not in given:
                    old.copy_(new)
            if operands:
                GPUS.touch_all("a replay", [Operand(result, True) for result in tensors_of(results)])


class Gpus:
    """The machine, and what this process did to it. `serving`: from now on nothing may be captured."""

    def __init__(self, count: int, order: Ordering) -> None:
        self.count, self.order = count, order
        self.serving = False
        self.captures = self.replays = self.device_waits = self.uploads = self.foreign_uploads = 0
        self.capability = (9, 0)
        self.pools: dict[object, tuple[Stream, GpuTensor]] = {}
        self._default: dict[torch.device, Stream] = {}
        self.free = {index: 80 << 30 for index in range(count)}
        self.streams: list[torch.device] = []
        self.pinned: list[torch.Tensor] = []
        self._own = threading.local()
        self._lock = threading.RLock()

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

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in memory that counts as pinned to the end, so that its address is nobody else's."""
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage().data_ptr()
        return any(storage == one.untyped_storage().data_ptr() for one in self.pinned)

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
        owner, memory = self.pools.setdefault(pool, (stream, GpuTensor(torch.zeros(1), stream.device)))
        assert owner is stream, "a stream gets no free block of another's"
        assert capture_error_mode == "thread_local", "other threads use CUDA meanwhile"
        self.captures += 1
        graph.memory = memory
        self.host_waits(torch.device("cuda", self.device), all_streams=True)  # torch does, as it enters
        with self.within(stream), self._set("operations", graph.operations):
            yield

    def synchronize(self, device: Any = None) -> None:
        self.device_waits += 1
        self.host_waits(indexed(device or torch.device("cuda", self.device)), all_streams=True)

    def stream_of(self, device: Any) -> Stream:
        current = self.stream
        if current is not None and current.device == indexed(device):
            return current
        with self._lock:
            if device not in self._default:
                self._default[device] = Stream(device, "the default stream of")
            return self._default[device]

    def host_waits(self, device: torch.device, all_streams: bool = False) -> None:
        """For the thread's stream there."""
        numbers = [self.stream_of(device).number]
        if all_streams:
            numbers = self.order.streams_of(str(device))
        for number in numbers:
            self.order.host_waits(self.order.queued(number))

    def new_memory(self, device: torch.device) -> Memory:
        """A capture's own belongs to no stream: it is used when the graph is replayed."""
        return Memory(self.order, None if self.recording() is not None else self.stream_of(device).number)

    def touch_all(self, what: str, operands: Sequence[Operand]) -> None:
        for tensor, writes, places in operands:
            if isinstance(tensor, GpuTensor):
                self.touch(tensor, writes, what, places() if places is not None else None)

    def touch(self, tensor: GpuTensor, writes: bool, what: str, places: Any = None) -> None:
        """By work on the thread's stream. What is captured does not run yet."""
        if self.recording() is None:
            stream = self.stream_of(tensor.device).number
            self.order.touch(tensor.memory, stream, writes, what, tensor.inner, places)

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


GPUS = Gpus(0, Ordering())


@contextmanager
def gpus(count: int, patch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """Let torch see so many GPUs, on the calling thread and on those that start meanwhile."""
    with kept(patch) as order, _gpus(count, order, patch) as machine:
        yield machine


@contextmanager
def _gpus(count: int, order: Ordering, patch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    global GPUS
    GPUS = machine = Gpus(count, order)
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
        get_device_properties=lambda device: SimpleNamespace(
            uuid=f"GPU-{indexed(device).index}", name="none", total_memory=80 << 30
        ),
    )
    for name, value in replaced.items():
        patch.setattr(torch.cuda, name, value)
    with _Mode():
        yield machine
