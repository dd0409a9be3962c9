"""The stand-in's own rules about streams (`tests/stream_order.py`): each is CUDA's, NCCL's or torch's allocator's."""

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.cuda_stand_in import Gpus, gpus

DEVICE = torch.device("cuda", 0)
Use = Callable[[torch.Tensor, torch.cuda.Stream], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    with gpus(1, monkeypatch) as found:
        yield found


def _event(other: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(DEVICE))
    return event


def _event_waited(shared: torch.Tensor, other: torch.cuda.Stream) -> None:
    other.wait_event(_event(other))


def _stream_waited(shared: torch.Tensor, other: torch.cuda.Stream) -> None:
    other.wait_stream(torch.cuda.current_stream(DEVICE))


def _queried(shared: torch.Tensor, other: torch.cuda.Stream) -> None:
    assert _event(other).query()


def _device_waited(shared: torch.Tensor, other: torch.cuda.Stream) -> None:
    torch.cuda.synchronize(DEVICE)


def _read_by_the_host(shared: torch.Tensor, other: torch.cuda.Stream) -> None:
    shared.tolist()


def _nothing(shared: torch.Tensor, other: torch.cuda.Stream) -> None:
    pass


def _recorded_too_early(shared: torch.Tensor, other: torch.cuda.Stream) -> None:
    event = _event(other)
    shared.add_(1)
    other.wait_event(event)


def _waited_by_another(shared: torch.Tensor, other: torch.cuda.Stream) -> None:
    torch.cuda.Stream(DEVICE).wait_event(_event(other))


def _queried_by_a_thread_that_tells_nobody(shared: torch.Tensor, other: torch.cuda.Stream) -> None:
    known = threading.Event()
    threading.Thread(target=lambda: (_event(other).query(), known.set())).start()
    known.wait()


def _used(machine: Gpus, order: Use) -> None:
    shared, other = torch.zeros(4, 8, device=DEVICE), torch.cuda.Stream(DEVICE)
    shared.add_(1)
    order(shared, other)
    try:
        with torch.cuda.stream(other):
            shared.sum()
    finally:
        torch.cuda.synchronize(DEVICE)  # before its memory is let go


@pytest.mark.parametrize("order", [_event_waited, _stream_waited, _queried, _device_waited, _read_by_the_host])
def test_ordered(machine: Gpus, order: Use) -> None:
    _used(machine, order)


@pytest.mark.parametrize(
    "order", [_nothing, _recorded_too_early, _waited_by_another, _queried_by_a_thread_that_tells_nobody]
)
def test_not_ordered(machine: Gpus, order: Use) -> None:
    with pytest.raises(AssertionError, match=r"sum reads on a stream of cuda:0 .* while .* may still run"):
        _used(machine, order)
    machine.order.faults.clear()


def test_other_rows_of_a_memory_are_others(machine: Gpus) -> None:
    """A mirror's slots are written on the link's stream while the engine reads other ones."""
    cache, other = torch.zeros(2, 8, 3, device=DEVICE), torch.cuda.Stream(DEVICE)
    mine, yours = torch.tensor([1, 5], device=DEVICE), torch.tensor([2, 6], device=DEVICE)
    other.wait_stream(torch.cuda.current_stream(DEVICE))
    cache.index_select(1, mine)
    cache[0, 3]
    with torch.cuda.stream(other):
        cache.index_copy_(1, yours, torch.ones(2, 2, 3, device=DEVICE))
        with pytest.raises(AssertionError, match=r"index_fill_ writes on .* while index_select reads"):
            cache.index_fill_(1, mine, 0)
    torch.cuda.synchronize(DEVICE)
    machine.order.faults.clear()


def test_bytes_are_bytes_whatever_they_are_viewed_as(machine: Gpus) -> None:
    flat, other = torch.zeros(64, dtype=torch.uint8, device=DEVICE), torch.cuda.Stream(DEVICE)
    other.wait_stream(torch.cuda.current_stream(DEVICE))
    flat[:32].view(torch.float32).add_(1)
    with torch.cuda.stream(other):
        flat[32:].add_(1)
        with pytest.raises(AssertionError, match="may still run"):
            flat[28:40].sum()
    torch.cuda.synchronize(DEVICE)
    machine.order.faults.clear()


def test_memory_is_its_streams_from_the_start_and_to_the_end(machine: Gpus) -> None:
    """Nobody wrote to it, yet what its bytes were used for before may still run; and so on for who gets them next."""
    other = torch.cuda.Stream(DEVICE)
    fresh = torch.empty(8, device=DEVICE)
    with torch.cuda.stream(other), pytest.raises(AssertionError, match="while allocation writes"):
        fresh.zero_()
    machine.order.faults.clear()
    other.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(other):
        fresh.zero_()
    del fresh
    gc.collect()
    assert "let go while zero_ writes on a stream of cuda:0" in machine.order.faults.pop()


def test_what_outlives_its_test_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some caches hold tensors until the interpreter ends, when there is nothing left to judge with."""
    with gpus(1, monkeypatch) as machine:
        other, outliving = torch.cuda.Stream(DEVICE), torch.zeros(8, device=DEVICE)
        other.wait_stream(torch.cuda.current_stream(DEVICE))
        with torch.cuda.stream(other):
            outliving.add_(1)
    del outliving
    gc.collect()
    assert machine.order.faults == []


def test_a_replay_touches_what_was_captured(machine: Gpus) -> None:
    given, out = torch.zeros(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    stream, graph = torch.cuda.Stream(DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, object(), stream, "thread_local"):  # type: ignore[arg-type]
        out.copy_(given + 1)
    graph.replay()
    other = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(other), pytest.raises(AssertionError, match="while a replay writes"):
        out.sum()
    machine.order.faults.clear()
    other.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(other):
        assert out.tolist() == [1.0] * 4
