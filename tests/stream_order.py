"""Which work comes before which: streams, events and threads as vector clocks, and who touched which bytes of a memory.

A GPU runs work of two streams side by side unless an event, a wait or the host orders them. A stand-in computes at
once, so its numbers are right in any order. Here a touch is a fault when nothing orders it after another stream's touch
of the same bytes. The allocator's rules count too: memory belongs to the stream that was current when it was made. So
another stream's first touch comes after that, and its last one has ended when the memory is let go.

Each thread has its own knowledge of what has ended. Knowledge passes with a thread's start and end, and with our links'
transfers: queues, frames, and a flag of the mirror.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy
import torch

Clock = dict[int, int]  # by stream: of its works, how many have ended
_BY_INDEX = {"index", "index_select", "index_copy_", "index_fill_"}


def join(clock: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


@dataclass(frozen=True, slots=True)
class Touch:
    """`cells`: the first byte of each element that was touched, and their size."""

    stream: int
    tick: int
    writes: bool
    what: str
    cells: Callable[[], tuple[numpy.ndarray, int]]


class Memory:
    """What was allocated at once. Of touches alike by one stream the last is kept: whoever comes after it comes after
    all. `owner`: the stream it was allocated for; None for what a capture keeps."""

    def __init__(self, order: "Ordering", owner: int | None) -> None:
        self.order, self.owner = order, owner
        self.touches: dict[Any, Touch] = {}

    def __del__(self) -> None:
        if self.owner is not None and len(self.touches) > 1 and not self.order.over:
            self.order.let_go(self.touches.values(), self.owner)


class Ordering:
    """`over`: its test has ended. What some cache keeps may be let go as late as the interpreter ends."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.over = False
        self._lock = threading.RLock()
        self._clocks: dict[int, Clock] = {}
        self._names: dict[int, str] = {}
        self._own = threading.local()
        self._frames: dict[bytes, Clock] = {}
        self._anyone: Clock = {}  # what some thread has seen ended

    @property
    def host(self) -> Clock:
        """What the calling thread knows to have ended."""
        if not hasattr(self._own, "clock"):
            self._own.clock = {}
        known: Clock = self._own.clock
        return known

    def new_stream(self, name: str) -> int:
        with self._lock:
            number = len(self._clocks) + 1
            self._clocks[number], self._names[number] = {}, f"{name} #{number}"
        return number

    def streams_of(self, device: str) -> list[int]:
        return [number for number, name in self._names.items() if device in name]

    def queued(self, stream: int) -> Clock:
        """What has ended once all that is queued on a stream by now has: an event recorded there."""
        with self._lock:
            join(self._clocks[stream], self.host)
            return dict(self._clocks[stream])

    def waits(self, stream: int, clock: Clock) -> None:
        """What is queued on the stream from now on comes after."""
        with self._lock:
            join(self._clocks[stream], clock)

    def host_waits(self, clock: Clock) -> None:
        with self._lock:
            join(self.host, clock)
            join(self._anyone, clock)

    def said(self, frame: bytes) -> bytes:
        with self._lock:
            join(self._frames.setdefault(frame, {}), self.host)
        return frame

    def heard(self, frame: bytes) -> bytes:
        self.host_waits(self._frames.get(frame, {}))
        return frame

    def touch(
        self, memory: Memory, stream: int, writes: bool, what: str, inner: torch.Tensor, places: Any = None
    ) -> None:
        """By work that is queued on a stream now. `places`: how numpy indexes what is touched of the tensor."""
        if inner.numel() == 0:
            return
        if memory.order is not self:  # of another test, kept in some cache
            memory.order, memory.owner, memory.touches = self, None, {}
        with self._lock:
            clock = self._clocks[stream]
            join(clock, self.host)
            clock[stream] = tick = clock.get(stream, 0) + 1
            geometry = (tuple(inner.shape), inner.stride(), inner.storage_offset(), inner.element_size())
            touch = Touch(stream, tick, writes, what, lambda: _cells(*geometry, places))
            for other in memory.touches.values():
                unordered = other.stream != stream and clock.get(other.stream, 0) < other.tick
                if unordered and (writes or other.writes) and _overlap(touch, other):
                    self._fault(f"{self._said(touch)} while {self._said(other)} may still run")
            memory.touches[stream, writes, geometry, _key(places)] = touch

    def let_go(self, touches: Iterable[Touch], owner: int) -> None:
        """The allocator gives the memory to whoever asks next on its stream. Whichever thread collects the garbage: by
        the clock on the wall, what any of them saw end has ended."""
        with self._lock:
            clock = dict(self._clocks[owner])
            join(clock, self._anyone)
            for touch in touches:
                if touch.stream != owner and clock.get(touch.stream, 0) < touch.tick:
                    self.faults.append(f"memory of {self._names[owner]} let go while {self._said(touch)} may still run")

    def _fault(self, said: str) -> None:
        self.faults.append(said)
        raise AssertionError(said)

    def _said(self, touch: Touch) -> str:
        return f"{touch.what} {'writes' if touch.writes else 'reads'} on {self._names[touch.stream]}"


class Operand(NamedTuple):
    """A tensor whose bytes an operation touches. `places`: how numpy indexes what is touched; None: all of it."""

    tensor: torch.Tensor
    writes: bool
    places: Callable[[], Any] | None = None


@cache
def _schema(operation: Any) -> tuple[bool, list[tuple[str, bool]]]:
    """Whether the result may be a view; names of the arguments, and which are written."""
    views = (result.alias_info for result in operation._schema.returns)
    return (
        any(alias is not None and not alias.is_write for alias in views),
        [(each.name, each.alias_info is not None and each.alias_info.is_write) for each in operation._schema.arguments],
    )


def tensors_of(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors_of(value)


def mapped(change: Callable[[Any], Any], values: Any) -> Any:
    """With its tensors changed."""
    if isinstance(values, torch.Tensor):
        return change(values)
    if isinstance(values, dict):
        return {key: mapped(change, value) for key, value in values.items()}
    return type(values)(mapped(change, value) for value in values) if isinstance(values, list | tuple) else values


def touched(operation: Any, given: tuple[Any, Any], results: Any) -> list[Operand]:
    """A view touches nothing. What is made anew is touched by its allocation."""
    args, kwargs = given
    may_view, arguments = _schema(operation)
    if may_view:
        memories = {_memory(tensor) for tensor in tensors_of(given)} - {None}
        if all(_memory(tensor) in memories for tensor in tensors_of(results)):
            return []
    found = []
    for number, (name, writes) in enumerate(arguments):
        operand = args[number] if number < len(args) else kwargs.get(name)
        places = partial(_places, args) if number == 0 and operation.overloadpacket.__name__ in _BY_INDEX else None
        found += [Operand(tensor, writes, places) for tensor in tensors_of(operand) if _memory(tensor) is not None]
    return found


def _memory(tensor: torch.Tensor) -> Memory | None:
    return getattr(tensor, "memory", None)


def _places(args: Any) -> Any:
    """Of an indexed operation: `index` takes a list of indices, the others a dimension and its index."""
    if isinstance(args[1], int):
        return (*[slice(None)] * (args[1] % args[0].dim()), _numbers(args[2]))
    return tuple(slice(None) if index is None else _numbers(index) for index in args[1])


def _numbers(index: Any) -> Any:
    return getattr(index, "inner", index).numpy().copy() if isinstance(index, torch.Tensor) else index


def _key(places: Any) -> Any:
    if isinstance(places, tuple):
        return tuple(map(_key, places))
    return places.tobytes() if isinstance(places, numpy.ndarray) else str(places)


def _cells(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int, size: int, places: Any
) -> tuple[numpy.ndarray, int]:
    found = numpy.asarray(offset)
    for length, stride in zip(shape, strides, strict=True):
        found = found[..., None] + numpy.arange(length) * stride
    return numpy.unique((found if places is None else found[places]) * size), size


def _overlap(one: Touch, other: Touch) -> bool:
    (ours, our_size), (theirs, their_size) = one.cells(), other.cells()
    if our_size != their_size:
        ours, theirs = (
            (cells[:, None] + numpy.arange(size)).ravel() for cells, size in ((ours, our_size), (theirs, their_size))
        )
    return bool(numpy.isin(ours, theirs).any())
