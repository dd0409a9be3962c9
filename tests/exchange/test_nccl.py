"""The NCCL side of a link, as far as it goes without a GPU: a stand-in keeps its rules (`tests/nccl_stand_in.py`)."""

import contextlib
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch

from tests.cuda_stand_in import Gpus, gpus
from tests.exchange.rig import QUICK, wait_until
from tests.exchange.scripted import CONFIG
from tests.nccl_stand_in import ProcessGroupNCCL, stand_in
from twotower.errors import LinkDown
from twotower.exchange import distributed_link
from twotower.exchange.data_group import DataGroup, device_name, join_store, serve_store
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.distributed_link import DistributedLink
from twotower.exchange.distributed_port import DistributedPort
from twotower.exchange.protocol import Command, Commit, Delta, LinkEvent, Prefill, Release
from twotower.exchange.settings import SSM_WIRE_DTYPES, LinkSettings
from twotower.exchange.staging import DeltaLayout, StagingBuffer, fitted
from twotower.model.cache import Span, TowerCache

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
HOST = "127.0.0.1"
PATIENCE_S = 10.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    with gpus(2, monkeypatch) as found, stand_in(monkeypatch):
        yield found


def _both(devices: tuple[torch.device, torch.device], timeout_s: float = PATIENCE_S) -> list[DataGroup]:
    """Both ends of a group, each made on a thread of its own, as two processes would."""
    store = serve_store(HOST, timeout_s)
    stores = [store, join_store(HOST, store.port, timeout_s)]
    with ThreadPoolExecutor(2) as pool:
        made = [
            pool.submit(DataGroup, "nccl", each, rank, device, HOST, timeout_s)
            for rank, (each, device) in enumerate(zip(stores, devices, strict=True))
        ]
        return [each.result() for each in made]


def _buffers(nbytes: int = 64) -> list[StagingBuffer]:
    return [StagingBuffer(nbytes, device, through_host=False) for device in (FIRST, SECOND)]


def test_bytes_cross_and_nobody_sleeps_in_a_wait(machine: Gpus) -> None:
    context, denoiser = _both((FIRST, SECOND))
    sent, received = _buffers()
    sent.flat.copy_(torch.arange(64, dtype=torch.uint8))
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(context.send, sent, 64, 1, PATIENCE_S)
        denoiser.receive(received, 64, 1, PATIENCE_S)
        sending.result()
    assert received.flat.tolist() == list(range(64))
    works = [work for group in ProcessGroupNCCL.groups for work in group.works]
    assert len(works) == 2
    for work in works:
        assert work.looks > 1 and work.slept == 0
    assert [group.communicators for group in _by_rank()] == [{0}, {1}]
    assert set(machine.streams) == {FIRST, SECOND}
    assert machine.device_waits == 0


def _by_rank() -> list[ProcessGroupNCCL]:
    return sorted(ProcessGroupNCCL.groups, key=lambda group: group.rank)


def test_a_group_for_a_device_without_an_index_is_not_made(machine: Gpus) -> None:
    with pytest.raises(AssertionError, match="by its index"):
        DataGroup("nccl", serve_store(HOST, PATIENCE_S), 0, torch.device("cuda"), HOST, PATIENCE_S)


def test_what_would_come_of_one(machine: Gpus) -> None:
    """The stand-in's own rule: a communicator of no index is found by no tensor."""
    store = serve_store(HOST, PATIENCE_S)
    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=PATIENCE_S)
    group = ProcessGroupNCCL(store, 1, 2, options)
    group.communicators.add(-1)
    with machine.within(torch.cuda.Stream(SECOND)), pytest.raises(AssertionError, match="no communicator under this"):
        group.recv([torch.empty(4, device=SECOND)], 0, 1)


def test_two_ranks_on_one_gpu_are_refused(machine: Gpus) -> None:
    assert device_name(FIRST) != device_name(SECOND)
    with pytest.raises(LinkDown, match="the data group could not be built: NCCL error"):
        _both((FIRST, FIRST))


def test_a_transfer_that_hangs_ends_at_its_deadline(machine: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessGroupNCCL, "hang", True)
    _, denoiser = _both((FIRST, SECOND))
    with pytest.raises(LinkDown, match=r"did not finish within 0\.1 s"):
        denoiser.receive(_buffers()[1], 64, 1, 0.1)
    assert [work.slept for group in _by_rank() for work in group.works] == [0]


def test_an_aborted_transfer_says_so(machine: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessGroupNCCL, "hang", True)
    _, denoiser = _both((FIRST, SECOND))
    threading.Timer(0.05, denoiser.abort).start()
    with pytest.raises(LinkDown, match="was aborted"):
        denoiser.receive(_buffers()[1], 64, 1, PATIENCE_S)


def test_a_buffer_grows_without_a_wait_for_the_device(machine: Gpus) -> None:
    """Also on a receiver's thread, while another thread may be capturing."""
    buffer = StagingBuffer(16, SECOND, through_host=True)
    first = buffer.fence
    assert first is not None, "the link's stream waits for what the memory was used for before"
    with ThreadPoolExecutor(1) as pool:
        pool.submit(buffer.grow, 32).result()
    assert buffer.flat.numel() == buffer.wire.numel() == 32
    assert buffer.fence is not None and buffer.fence is not first
    assert machine.device_waits == 0


def test_fitted_buffers_hold_the_longest_delta() -> None:
    cache = TowerCache(CONFIG, 4, 64, torch.device("cpu"), torch.float32)
    longest = DeltaLayout(cache, "float32").nbytes([Delta(0, 0, 100_000, 0)])
    plain, long = (fitted(LinkSettings(), cache, positions).staging_bytes for positions in (16, 100_000))
    assert plain < long == longest


@pytest.mark.parametrize("wire", SSM_WIRE_DTYPES)
@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_a_link_between_two_gpus(machine: Gpus, backend: str, wire: str) -> None:
    """From the introduction to a delta in the mirror: over NCCL, and over gloo through pinned memory."""
    _exchange(machine, backend, wire)
    assert bool(ProcessGroupNCCL.groups) == (backend == "auto")
    assert {work.slept for group in _by_rank() for work in group.works} <= {0}
    assert machine.device_waits == 0
    assert machine.uploads > 4 and machine.foreign_uploads == 0


def test_a_new_buffer_is_the_links_once_its_memory_is(machine: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compute stream used these bytes for before may still run, though nobody has written to the buffer."""
    _, denoiser = _both((FIRST, SECOND))
    monkeypatch.setattr(StagingBuffer, "mark", lambda buffer: setattr(buffer, "fence", None))
    with pytest.raises(AssertionError, match=r"a transfer writes on NCCL's .* while allocation writes on the default"):
        denoiser.receive(_buffers()[1], 64, 1, PATIENCE_S)
    machine.order.faults.clear()


@pytest.mark.parametrize("backend", ["auto", "gloo"])
@pytest.mark.parametrize(
    ("left_out", "fault"),
    [
        ((distributed_link, "fence_on"), "index_copy_ writes on a stream of cuda:1 .* the default stream of cuda:1"),
        ((DataGroup, "_finish"), "on the default stream of cuda:1 .* on a stream of cuda:1"),
    ],
)
def test_what_orders_a_links_streams_would_be_missed(
    machine: Gpus, backend: str, left_out: tuple[object, str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the fence of a mirror's slot, or the wait for the link's stream."""
    monkeypatch.setattr(*left_out, lambda *_: None)
    with contextlib.suppress(AssertionError, LinkDown):
        _exchange(machine, backend)
    assert any(re.search(fault, said) for said in machine.order.faults), machine.order.faults
    machine.order.faults.clear()


@pytest.mark.parametrize("ended", [True, False])
def test_a_delta_under_way_when_its_sequence_is_released(
    machine: Gpus, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mock-AR's last token: the engine reads the sequence, and releases it once it has seen its pass end. From then on
    the delta, found wanted before, may be written beside it. An engine that did not wait for its pass is seen."""
    found_wanted, may_come = threading.Event(), threading.Event()
    sift = DistributedLink._sift

    def then_held(*given: Any) -> Any:
        arrived = sift(*given)
        found_wanted.set()
        assert may_come.wait(PATIENCE_S)
        return arrived

    with _linked(machine, "auto") as (port, link, caches), contextlib.ExitStack() as held:
        held.callback(may_come.set)
        slots = _prefill(machine, port, link, caches)
        monkeypatch.setattr(DistributedLink, "_sift", then_held)
        with machine.on(SECOND):
            link.submit([Commit(7, 20, (1, 2))], reading=True)
            seen, *_ = caches[1].delta([Span(slots[1], 0, 20)])
        _await_command(port)
        caches[0].advance(slots[0], 2)
        port.send([Delta(7, 20, 22, slots[0])])
        assert found_wanted.wait(PATIENCE_S)
        with machine.on(SECOND):
            if ended:
                seen.tolist()
            link.submit([Release(7)])
        may_come.set()
        wait_until(lambda: link._inbox or link._endpoint.lost)
    torch.cuda.synchronize(SECOND)  # before its memory is let go
    fault = "index_copy_ writes on a stream of cuda:1 .* while index_select reads on the default stream of cuda:1"
    assert [bool(re.search(fault, said)) for said in machine.order.faults] == [True] * (not ended)
    machine.order.faults.clear()


def _exchange(machine: Gpus, backend: str, wire: str = "float32") -> None:
    with _linked(machine, backend, wire) as (port, link, caches):
        slots = _prefill(machine, port, link, caches)
        ours = caches[0].delta([Span(slots[0], 0, 20)])
        with machine.on(SECOND):
            theirs = caches[1].delta([Span(slots[1], 0, 20)])
        for a, b in zip(ours, theirs, strict=True):  # rounded or not: all states are the largest of their channel
            torch.testing.assert_close(torch.tensor(a.tolist()), torch.tensor(b.tolist()), rtol=1e-6, atol=0)


@contextlib.contextmanager
def _linked(
    machine: Gpus, backend: str, wire: str = "float32"
) -> Iterator[tuple[DistributedPort, DistributedLink, list[TowerCache]]]:
    """Both ends, and their caches: the context tower's first."""
    settings = replace(QUICK, data_backend=backend, ssm_wire_dtype=wire)
    caches = []
    for device in (FIRST, SECOND):
        with machine.on(device):
            caches.append(TowerCache(CONFIG, 4, 64, device, torch.float32))
    port, address = open_port(caches[0], 0, 0, settings)
    with contextlib.ExitStack() as opened:
        opened.callback(port.close)
        link = connect(address, caches[1])
        opened.callback(link.close)
        yield port, link, caches


def _prefill(machine: Gpus, port: DistributedPort, link: DistributedLink, caches: list[TowerCache]) -> list[int]:
    """Sequence 7 in both caches, 20 positions of it; its slots there."""
    with machine.on(SECOND):
        link.submit([Prefill(7, tuple(range(20)), 32)])
    _await_command(port)
    slot = caches[0].allocate(32)
    caches[0].ssm[:, slot] = 3.0
    caches[0].keys[:, caches[0].pages_of(slot)[0]] = 5.0
    caches[0].advance(slot, 20)
    port.send([Delta(7, 0, 20, slot)])
    events: list[LinkEvent] = []
    with machine.on(SECOND):
        wait_until(lambda: events.extend(link.poll()) or events)
    [delta] = events
    assert isinstance(delta, Delta)
    return [slot, delta.slot]


def _await_command(port: DistributedPort) -> None:
    commands: list[Command] = []
    wait_until(lambda: commands.extend(port.receive()) or commands)
