"""A ProcessGroupNCCL that carries bytes between threads of this process, with the rules of torch's.

The rules that matter here:
- A communicator is stored under its device's index, -1 if the device has none. A transfer finds it by its tensor's
  device.
- Two ranks need two GPUs.
- `wait` with a timeout sleeps for milliseconds between looks. A caller in a hurry asks `is_completed` first.
- The work of an aborted group has ended, and `wait` need not say how.
- Transfers run on a stream of the group's own, which first waits for the caller's stream. `wait` makes the caller's
  stream wait for it.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed
from torch import Tensor

from tests import cuda_stand_in

_LOOKS = 3  # in vain, before a transfer is seen to have ended


class ProcessGroupNCCL:
    """`groups`: all that were made. `hang`: transfers never end."""

    groups: ClassVar[list["ProcessGroupNCCL"]] = []
    hang = False
    _wires: ClassVar[dict[tuple[int, int, str], SimpleQueue[Tensor]]] = {}
    _lock = threading.Lock()

    class Options:
        _timeout = timedelta(minutes=10)

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        assert cuda_stand_in.GPUS.count, "ProcessGroupNCCL is only supported with GPUs"
        assert options._timeout < timedelta(minutes=10), "the default's patience"
        self.store, self.rank = store, rank
        self.communicators: set[int] = set()
        self.aborted = False
        self.works: list[Work] = []
        self.groups.append(self)

    def eager_connect_single_device(self, device: torch.device) -> None:
        index = -1 if device.index is None else device.index
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        self.store.set(f"gpu of {self.rank}", uuid)
        if self.store.get(f"gpu of {1 - self.rank}").decode() == uuid:
            raise RuntimeError("NCCL error: invalid usage\nDuplicate GPU detected : rank 0 and rank 1")
        self.communicators.add(index)
        self.stream = cuda_stand_in.Stream(device, "NCCL's stream of")

    def send(self, tensors: Sequence[Tensor], rank: int, tag: int) -> "Work":
        (tensor,) = tensors
        self._check(tensor)
        self._touch(tensor, False)
        self._wire(self.rank, rank).put(tensor.inner.clone())  # type: ignore[attr-defined]
        return self._begun(None, None)

    def recv(self, tensors: Sequence[Tensor], rank: int, tag: int) -> "Work":
        (tensor,) = tensors
        self._check(tensor)
        self._touch(tensor, True)
        return self._begun(tensor, self._wire(rank, self.rank))

    def abort(self) -> None:
        self.aborted = True
        if self.communicators:  # what it carried has ended, and whoever aborts knows
            ended = cuda_stand_in.Event()
            ended.record(self.stream)
            ended.query()

    def _check(self, tensor: Tensor) -> None:
        assert tensor.device.type == "cuda" and tensor.is_contiguous(), f"NCCL carries no {tensor.device} tensors"
        assert tensor.device.index in self.communicators, (
            "hangs: no communicator under this index, a new one is awaited"
        )
        stream = cuda_stand_in.GPUS.stream
        assert stream is not None and stream.device == tensor.device, "a transfer on the compute stream"

    def _touch(self, tensor: Tensor, writes: bool) -> None:
        machine = cuda_stand_in.GPUS
        self.stream.wait_stream(machine.stream_of(tensor.device))
        with machine.within(self.stream):
            machine.touch(tensor, writes, "a transfer")  # type: ignore[arg-type]

    def _wire(self, sender: int, receiver: int) -> SimpleQueue[Tensor]:
        with self._lock:
            return self._wires.setdefault((self.store.port, sender, f"to {receiver}"), SimpleQueue())

    def _begun(self, target: Tensor | None, wire: SimpleQueue[Tensor] | None) -> "Work":
        self.works.append(Work(self, target, wire))
        return self.works[-1]


@contextmanager
def stand_in(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the place of torch's."""
    patch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    patch.setattr(torch.distributed, "ProcessGroupNCCL", ProcessGroupNCCL, raising=False)
    ProcessGroupNCCL.groups.clear()
    yield


class Work:
    def __init__(self, group: ProcessGroupNCCL, target: Tensor | None, wire: SimpleQueue[Tensor] | None) -> None:
        self._group, self._target, self._wire = group, target, wire
        self.looks = self.slept = 0
        self._ended = False
        self._end = cuda_stand_in.Event()
        self._end.record(group.stream)

    def is_completed(self) -> bool:
        self.looks += 1
        if not self._ended and self.looks > _LOOKS and not self._group.hang:
            self._ended = self._arrived()
            if self._ended:
                self._end.query()
        return self._ended or self._group.aborted

    def wait(self, timeout: timedelta) -> bool:
        if not self._ended and not self._group.aborted:
            self.slept += 1
        cuda_stand_in.GPUS.stream_of(self._group.stream.device).wait_event(self._end)
        return True

    def _arrived(self) -> bool:
        if self._wire is None:
            return True
        try:
            sent = self._wire.get_nowait()
        except Empty:
            return False
        assert self._target is not None
        self._target.inner.copy_(sent)  # type: ignore[attr-defined]
        return True
