"""Two processes on one device over the `distributed` exchange: real streams, staging, epochs, and a kill -9.

The context side is scripted. Instead of a tower's forward it runs a product that keeps the compute stream busy, then
fills states with a number that both sides know. The denoiser side checks every element on its device, while its own
compute stream is busy too. A copy that overtook its fence shows as a wrong number.
"""

import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.gpu_parts.report import Report, table
from benchmarks.gpu_parts.site import Site
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.protocol import Command, Commit, Delta, Link, LinkLost, Port, Prefill, Release, Released, Reply
from twotower.exchange.settings import EngineHooks, LinkAddress, LinkSettings
from twotower.exchange.staging import DeltaLayout, span_of
from twotower.model.cache import TowerCache
from twotower.model.pages import page_tokens_on, pages_for
from twotower.model.transfer import on_device

_BLOCK = 16
_PATIENCE_S = 30.0
_SETTINGS = LinkSettings(link_timeout_s=_PATIENCE_S, data_backend="gloo", staging_bytes=64 << 20)


def _cache(site: Site) -> TowerCache:
    rows = max(site.exchange_rows)
    dtype = torch.float32 if site.tiny else torch.bfloat16
    pages = rows * pages_for(_reserve(site), page_tokens_on(site.device.type))
    return TowerCache(site.config, rows, pages, site.device, dtype)


def _reserve(site: Site) -> int:
    return _BLOCK * (site.exchange_rounds + 3)


def _number(sequence: int, end: int) -> int:
    """What a sequence's state is filled with after `end` positions; exact in bf16."""
    return (31 * sequence + end) % 251 + 1


class Busy:
    """A product that occupies the compute stream for some milliseconds on a GPU."""

    def __init__(self, site: Site) -> None:
        size, dtype = (32, torch.float32) if site.device.type == "cpu" else (8192, torch.bfloat16)
        self._factor = torch.zeros(size, size, device=site.device, dtype=dtype)

    def __call__(self) -> Tensor:
        return self._factor @ self._factor


class ScriptedContext:
    """Answers commands as a context engine would."""

    def __init__(self, site: Site, port: Port, cache: TowerCache) -> None:
        self._port, self._cache, self._busy = port, cache, Busy(site)
        self._slots: dict[int, int] = {}

    def tick(self) -> None:
        replies = [self._answer(command) for command in self._port.receive()]
        self._port.send(replies)

    def _answer(self, command: Command) -> Reply:
        if isinstance(command, Release):
            self._cache.free(self._slots.pop(command.sequence))
            return Released(command.sequence)
        if isinstance(command, Prefill):
            self._slots[command.sequence] = self._cache.allocate(command.reserve)
        assert isinstance(command, Prefill | Commit)
        slot = self._slots[command.sequence]
        start = self._cache.length(slot)
        end = start + len(command.token_ids)
        self._busy()
        _fill(self._cache, slot, start, end, _number(command.sequence, end))
        self._cache.advance(slot, end - start)
        return Delta(command.sequence, start, end, slot)


def _fill(cache: TowerCache, slot: int, start: int, end: int, number: int) -> None:
    places = on_device(cache.flat_positions(slot, start, end), cache.device, torch.long)
    for paged in (cache.keys, cache.values):
        paged.flatten(1, 2).index_fill_(1, places, number)
    cache.conv[:, slot] = number
    cache.ssm[:, slot] = number


def _wrong(cache: TowerCache, delta: Delta) -> Tensor:
    """How many elements of the mirror are not what they must be, counted on the device."""
    number = _number(delta.sequence, delta.end)
    tensors = cache.delta([span_of(delta)])
    return torch.stack([(tensor != number).sum() for tensor in tensors]).sum()


@torch.inference_mode()
def context_process(site: Site, pipe: "Connection[Any, Any]", epoch: int) -> None:
    torch.set_num_threads(1)
    cache, woken = _cache(site), threading.Event()
    port, address = open_port(cache, 0, epoch, _SETTINGS, EngineHooks(on_activity=woken.set))
    pipe.send(address)
    _serve(ScriptedContext(site, port, cache), port, woken, lambda: False)
    port.close()


def _serve(engine: ScriptedContext, port: Port, woken: threading.Event, enough: Callable[[], bool]) -> None:
    while port.lost is None and not enough():
        woken.wait(0.05)
        woken.clear()
        engine.tick()


@torch.inference_mode()
def denoiser_process(site: Site, pipe: "Connection[Any, Any]", epoch: int) -> None:
    """Commits one sequence's blocks until it is killed."""
    torch.set_num_threads(1)
    side = DenoiserSide(site, pipe.recv(), _cache(site))
    length = side.exchange([Prefill(1, tuple(range(_BLOCK)), _reserve(site))])[0].end
    pipe.send("stepping")
    while True:
        if length + _BLOCK > _reserve(site):
            time.sleep(0.01)
            continue
        length = side.exchange([Commit(1, length, tuple(range(_BLOCK)))])[0].end


class DenoiserSide:
    """The link, its mirror, and a count of wrong elements."""

    def __init__(self, site: Site, address: LinkAddress, mirror: TowerCache) -> None:
        self._woken = threading.Event()
        self.mirror, self._busy = mirror, Busy(site)
        self.link: Link = connect(address, mirror, EngineHooks(on_activity=self._woken.set))
        self.wrong = torch.zeros((), dtype=torch.long, device=site.device)
        self.lost: str | None = None

    def exchange(self, commands: Sequence[Command]) -> list[Delta]:
        """Submit and wait for as many deltas, each checked on the device behind a busy compute stream."""
        self.link.submit(commands)
        deltas: list[Delta] = []
        self.wait(lambda: len(deltas) >= len(commands), deltas)
        return deltas

    def wait(self, enough: Callable[[], bool], deltas: list[Delta]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not enough():
            for event in self.link.poll():
                if isinstance(event, LinkLost):
                    self.lost = event.reason
                    return
                assert isinstance(event, Delta | Released), event
                if isinstance(event, Delta):
                    self._busy()
                    self.wrong += _wrong(self.mirror, event)
                    deltas.append(event)
            self.link.submit(())
            assert time.monotonic() < deadline, "the context side did not answer"
            self._woken.wait(0.01)
            self._woken.clear()


@dataclass(frozen=True)
class _Child:
    process: Any
    pipe: Any


@contextmanager
def _child(target: Callable[..., None], site: Site, epoch: int) -> Iterator[_Child]:
    spawn = multiprocessing.get_context("spawn")
    pipe, far_end = spawn.Pipe()
    process = spawn.Process(target=target, args=(site, far_end, epoch), daemon=True)
    process.start()
    far_end.close()
    try:
        yield _Child(process, pipe)
    finally:
        process.kill()
        process.join(10)


@torch.inference_mode()
def run(site: Site, report: Report) -> None:
    mirror = _cache(site)
    bar = tqdm(total=3, desc="exchange", unit="part")
    with _child(context_process, site, 0) as context:
        side = DenoiserSide(site, context.pipe.recv(), mirror)
        report.add(_transfers(site, side))
        bar.update()
        lines = [_context_killed(site, side, context)]
        bar.update()
        if wrong := int(side.wrong.item()):
            report.fault(f"exchange: {wrong} elements arrived wrong")
    lines.append(_next_epoch(site, mirror, report))
    lines.append(_denoiser_killed(site))
    bar.update()
    bar.close()
    report.add("## A process killed with SIGKILL\n\n" + table(["what", "seen"], lines))


def _transfers(site: Site, side: DenoiserSide) -> str:
    layout = DeltaLayout(side.mirror, _SETTINGS.ssm_wire_dtype)
    nbytes = layout.nbytes([Delta(1, 0, _BLOCK, 0)])
    rows = [[str(count), *_timed_rounds(site, side, count, nbytes)] for count in site.exchange_rows]
    wrong = int(side.wrong.item())
    verdict = "every element as sent" if wrong == 0 else f"{wrong} WRONG ELEMENTS"
    return (
        "## Exchange between two processes\n\n"
        + table(["rows committed at once", "MB each", "all deltas, ms", "one delta, ms", "GB/s"], rows)
        + f"\n\n`Commit` submitted to last delta applied, medians of {site.exchange_rounds} rounds, gloo over loopback"
        + (", staged through pinned memory" if site.device.type == "cuda" else ", no staging: a CPU")
        + f"; both compute streams busy meanwhile. Checked on the device: {verdict}."
    )


def _timed_rounds(site: Site, side: DenoiserSide, count: int, nbytes: int) -> list[str]:
    sequences = range(100 * count, 100 * count + count)
    deltas = side.exchange([Prefill(n, tuple(range(_BLOCK)), _reserve(site)) for n in sequences])
    seconds = []
    for _ in range(site.exchange_rounds):
        ends = {delta.sequence: delta.end for delta in deltas}
        started = time.perf_counter()
        deltas = side.exchange([Commit(n, ends[n], tuple(range(_BLOCK))) for n in sequences])
        seconds.append(time.perf_counter() - started)
    side.link.submit([Release(n) for n in sequences])
    side.wait(lambda: side.mirror.room.free_slots == max(site.exchange_rows), [])
    middle = statistics.median(seconds)
    return [
        f"{nbytes / 1e6:.2f}", f"{middle * 1e3:.1f}", f"{middle / count * 1e3:.1f}",
        f"{count * nbytes / middle / 1e9:.2f}",
    ]  # fmt: skip


def _context_killed(site: Site, side: DenoiserSide, context: _Child) -> list[str]:
    """While deltas of every row are on their way."""
    rows = range(1, max(site.exchange_rows) + 1)
    deltas = side.exchange([Prefill(n, tuple(range(_BLOCK)), _reserve(site)) for n in rows])
    side.link.submit([Commit(delta.sequence, delta.end, tuple(range(_BLOCK))) for delta in deltas])
    os.kill(context.process.pid, signal.SIGKILL)
    killed = time.monotonic()
    while side.lost is None:
        side.wait(lambda: side.lost is not None, [])
    noticed = time.monotonic() - killed
    side.link.close()
    free = f"{side.mirror.room.free_slots} of {max(site.exchange_rows)} mirror slots free again"
    return ["context process, mid-transfer", f"noticed after {noticed * 1e3:.0f} ms: “{side.lost}”; {free}"]


def _next_epoch(site: Site, mirror: TowerCache, report: Report) -> list[str]:
    started = time.monotonic()
    with _child(context_process, site, 1) as context:
        side = DenoiserSide(site, context.pipe.recv(), mirror)
        up = time.monotonic() - started
        side.exchange([Prefill(1, tuple(range(_BLOCK)), _reserve(site))])
        served = time.monotonic() - started
        wrong = int(side.wrong.item())
        side.link.close()
    if wrong:
        report.fault(f"exchange under the next epoch: {wrong} elements arrived wrong")
    verdict = "right" if wrong == 0 else f"{wrong} WRONG ELEMENTS"
    return ["a replacement under epoch 1", f"linked after {up:.1f} s, first delta after {served:.1f} s, {verdict}"]


def _denoiser_killed(site: Site) -> list[str]:
    cache, woken = _cache(site), threading.Event()
    settings = EngineHooks(on_activity=woken.set)
    port, address = open_port(cache, 1, 0, _SETTINGS, settings)
    engine = ScriptedContext(site, port, cache)
    with _child(denoiser_process, site, 0) as denoiser:
        denoiser.pipe.send(address)
        _serve(engine, port, woken, denoiser.pipe.poll)
        os.kill(denoiser.process.pid, signal.SIGKILL)
        killed = time.monotonic()
        while port.lost is None and time.monotonic() < killed + _PATIENCE_S:
            engine.tick()
            time.sleep(0.001)
        noticed = time.monotonic() - killed
    reason = port.lost
    port.close()
    return ["denoiser process", f"noticed after {noticed * 1e3:.0f} ms: “{reason}”"]
