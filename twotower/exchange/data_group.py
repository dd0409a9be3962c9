"""Carries bytes from the context tower to the denoiser: a separate process group of two, never the default one.

One code path for gloo and NCCL. Every call blocks the link's own thread, with a deadline; after an error or timeout
the group is dead. On a GPU all copies run on the link's stream, and a buffer is handed over only after they ended.
Nothing of the CUDA side of this file has been seen running yet.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from twotower.errors import ConfigError, LinkDown
from twotower.exchange.staging import StagingBuffer

CONTEXT_RANK, DENOISER_RANK = 0, 1
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's words for it
_POLL_S = 50e-6


def serve_store(host: str, timeout_s: float) -> TCPStore:
    """The store through which the two ends find each other, listening on `host` only (torch's default: everywhere)."""
    listening = socket.create_server((host, 0))
    port = int(listening.getsockname()[1])
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listening.detach(),
    )


def join_store(host: str, port: int, timeout_s: float) -> TCPStore:
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def device_name(device: torch.device) -> str:
    """The same for two processes only if both use the same physical device."""
    if device.type != "cuda":
        return device.type
    return f"cuda {torch.cuda.get_device_properties(device).uuid}"


def choose_backend(wanted: str, context_device: str, denoiser_device: str) -> str:
    """NCCL needs two different GPUs. Takes `device_name`s. Raises ConfigError."""
    two_gpus = context_device != denoiser_device and all(
        name.startswith("cuda") for name in (context_device, denoiser_device)
    )
    if wanted == "nccl" and not two_gpus:
        raise ConfigError(f"data_backend: got nccl for devices {context_device} and {denoiser_device}, wanted two GPUs")
    return ("nccl" if two_gpus else "gloo") if wanted == "auto" else wanted


class _Work(Protocol):
    def is_completed(self) -> bool: ...

    def wait(self, timeout: timedelta) -> bool: ...


class _Group(Protocol):
    """The parts of ProcessGroupGloo and ProcessGroupNCCL that we use; torch's stubs do not describe them."""

    def send(self, tensors: Sequence[Tensor], rank: int, tag: int, /) -> _Work: ...

    def recv(self, tensors: Sequence[Tensor], rank: int, tag: int, /) -> _Work: ...

    def abort(self) -> None: ...


class DataGroup:
    """One end of the group. `send` at the context side, `receive` at the denoiser's; each from one thread only."""

    def __init__(
        self, backend: str, store: TCPStore, rank: int, device: torch.device, host: str, timeout_s: float
    ) -> None:
        assert device.type != "cuda" or device.index is not None, "NCCL finds a device's communicator by its index"
        self._peer = 1 - rank
        self._polls = backend == "nccl"
        self._aborted = False
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with _explained("could not be built", timeout_s):
            build = _nccl_group if backend == "nccl" else _gloo_group
            self._group = build(store, rank, device, host, timeout_s)

    def send(self, buffer: StagingBuffer, nbytes: int, number: int, timeout_s: float) -> None:
        """Returns when the bytes have left the buffer. Raises LinkDown; ConnectionError if the other side is gone."""
        deadline = time.monotonic() + timeout_s
        wire = buffer.wire[:nbytes]
        with _explained("broke", timeout_s), self._after(buffer.fence):
            if buffer.wire is not buffer.flat:
                wire.copy_(buffer.flat[:nbytes], non_blocking=True)
                self._finish(deadline)
            self._await(self._group.send([wire], self._peer, number), deadline, timeout_s)
            self._finish(deadline)

    def receive(
        self,
        buffer: StagingBuffer,
        nbytes: int,
        number: int,
        timeout_s: float,
        unpacking: AbstractContextManager[None] | None = None,
    ) -> None:
        """Returns when the bytes are in `buffer.flat` and have been unpacked. Raises what `send` does.

        Entering `unpacking` unpacks them on the link's stream. It exits once that work has ended.
        """
        deadline = time.monotonic() + timeout_s
        wire = buffer.wire[:nbytes]
        with _explained("broke", timeout_s), self._after(buffer.fence):
            self._await(self._group.recv([wire], self._peer, number), deadline, timeout_s)
            if buffer.wire is not buffer.flat:
                buffer.flat[:nbytes].copy_(wire, non_blocking=True)
            self._finish(deadline)  # a transfer that broke must not be unpacked
            with unpacking or contextlib.nullcontext():
                self._finish(deadline)

    def abort(self) -> None:
        """End a transfer in progress (NCCL; gloo's operations run to their deadline, or end with the other side)."""
        self._aborted = True  # first: a waiting thread checks this once its transfer has ended
        with contextlib.suppress(RuntimeError):
            self._group.abort()

    @contextlib.contextmanager
    def _after(self, fence: "torch.cuda.Event | None") -> Iterator[None]:
        """On the link's stream, once the compute stream is done with the buffer."""
        # Caches, and buffers that grew on an engine's thread, are inference tensors, written to only in inference mode.
        with torch.inference_mode():
            if self._stream is None:
                yield
                return
            with torch.cuda.stream(self._stream):
                if fence is not None:
                    self._stream.wait_event(fence)
                yield

    def _await(self, work: _Work, deadline: float, timeout_s: float) -> None:
        """Wait until the transfer has ended. Raises the error that broke it."""
        if self._polls:
            # NCCL's own wait polls once in ten milliseconds. It returns at once for an ended transfer.
            _poll(work.is_completed, deadline)
        work.wait(timedelta(seconds=timeout_s))
        if self._aborted:
            raise RuntimeError("it was aborted")  # NCCL's work of an aborted group may look completed

    def _finish(self, deadline: float) -> None:
        """Wait until the link's stream is empty: by polling, because a CUDA wait knows no deadline."""
        if self._stream is None:
            return
        done = torch.cuda.Event()
        done.record(self._stream)
        _poll(done.query, deadline)


def _poll(ended: Callable[[], bool], deadline: float) -> None:
    while not ended():
        if time.monotonic() > deadline:
            raise RuntimeError("Timed out")
        time.sleep(_POLL_S)


def _gloo_group(store: TCPStore, rank: int, device: torch.device, host: str, timeout_s: float) -> _Group:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 1
    options._devices = [ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
    return cast(_Group, ProcessGroupGloo(store, rank, 2, options))


def _nccl_group(store: TCPStore, rank: int, device: torch.device, host: str, timeout_s: float) -> _Group:
    if not torch.distributed.is_nccl_available():
        raise ConfigError("data_backend: got nccl, but this torch was built without it; wanted gloo")
    # Read by torch and NCCL when a group is made. The watchdog must abort a dead group without ending the process.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    if host.startswith("127."):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    group = ProcessGroupNCCL(store, rank, 2, options)
    group.eager_connect_single_device(device)
    return cast(_Group, group)


@contextlib.contextmanager
def _explained(what: str, timeout_s: float) -> Iterator[None]:
    """torch's many-line RuntimeErrors as one sentence."""
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if any(words in first_line for words in _GONE):
            raise ConnectionError(first_line) from error
        if "Timed out" in first_line or "timeout" in first_line.lower():
            raise LinkDown(f"a transfer did not finish within {timeout_s:g} s") from error
        raise LinkDown(f"the data group {what}: {first_line}") from error
