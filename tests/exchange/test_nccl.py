"""The NCCL side of a link, as far as it goes without a GPU: a stand-in keeps its rules (`tests/nccl_stand_in.py`)."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from tests.cuda_stand_in import Gpus, gpus
from tests.exchange.rig import QUICK, wait_until
from tests.exchange.scripted import CONFIG
from tests.nccl_stand_in import ProcessGroupNCCL, stand_in
from twotower.errors import LinkDown
from twotower.exchange.data_group import DataGroup, device_name, join_store, serve_store
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.protocol import Delta, LinkEvent, Prefill
from twotower.exchange.settings import LinkSettings
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
    assert buffer.fence is None
    with ThreadPoolExecutor(1) as pool:
        pool.submit(buffer.grow, 32).result()
    assert buffer.flat.numel() == buffer.wire.numel() == 32
    assert buffer.fence is not None, "the link's stream waits for what the memory was used for before"
    assert machine.device_waits == 0


def test_fitted_buffers_hold_the_longest_delta() -> None:
    cache = TowerCache(CONFIG, 4, 64, torch.device("cpu"), torch.float32)
    longest = DeltaLayout(cache, "float32").nbytes([Delta(0, 0, 100_000, 0)])
    plain, long = (fitted(LinkSettings(), cache, positions).staging_bytes for positions in (16, 100_000))
    assert plain < long == longest


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_a_link_between_two_gpus(machine: Gpus, backend: str) -> None:
    """From the introduction to a delta in the mirror: over NCCL, and over gloo through pinned memory."""
    settings = replace(QUICK, data_backend=backend)
    caches = []
    for device in (FIRST, SECOND):
        with machine.on(device):
            caches.append(TowerCache(CONFIG, 4, 64, device, torch.float32))
    port, address = open_port(caches[0], 0, 0, settings)
    link = connect(address, caches[1])
    try:
        with machine.on(SECOND):
            link.submit([Prefill(7, tuple(range(20)), 32)])
        commands: list[object] = []
        wait_until(lambda: commands.extend(port.receive()) or commands)
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
        ours = caches[0].delta([Span(slot, 0, 20)])
        with machine.on(SECOND):
            theirs = caches[1].delta([Span(delta.slot, 0, 20)])
        assert [a.tolist() for a in ours] == [b.tolist() for b in theirs]
    finally:
        link.close()
        port.close()
    assert bool(ProcessGroupNCCL.groups) == (backend == "auto")
    assert {work.slept for group in _by_rank() for work in group.works} <= {0}
    assert machine.device_waits == 0
    assert machine.uploads > 4 and machine.foreign_uploads == 0
