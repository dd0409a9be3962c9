"""Whole cells of tower processes on GPUs that are none (`tests/cuda_stand_in.py`), put together as in production.

Only Ray is left out: the classes that its actors host run in this process, each with a GPU of its own.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from actors import cell, cell_towers, towers
from actors.cell import RunningPair, start_pair
from actors.hosts import Host
from actors.remote import RemoteEngine
from actors.settings import CellSettings
from actors.towers import TowerProcess
from tests.cuda_stand_in import Gpus, gpus
from tests.engine.decode import collect
from tests.goldens import VENDORED
from tests.nccl_stand_in import ProcessGroupNCCL, stand_in
from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.engine import capture
from twotower.engine.handle import EngineStats
from twotower.engine.in_process import open_pair
from twotower.engine.settings import EngineSettings
from twotower.errors import ConfigError, Unavailable
from twotower.model import loading

ENGINE = EngineSettings(2, 64, prefill_chunk_tokens=32, link_timeout_s=30, stall_timeout_s=30, capture="off")


class Here(RemoteEngine):
    """An actor of this process. From the first joining on nothing may be captured any more."""

    made: list["Here"]

    def __init__(self, actor: TowerProcess, name: str, machine: Gpus) -> None:
        super().__init__(actor, name, 30)
        self.actor, self._machine, self.killed = actor, machine, False

    async def call(self, method: str, *args: object, timeout_s: float | None = None) -> Any:
        if method != "load":
            self._machine.serving = True
        return await getattr(self.actor, method)(*args)

    def kill(self) -> None:
        self.killed = True
        self.actor.runner.stop()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """Each process is given the GPU of its place, as Ray would."""
    Here.made = []
    with gpus(2, monkeypatch) as found, stand_in(monkeypatch):

        def start_tower(kind: type[Host], settings: CellSettings, _: object, bundle: int, name: str) -> Here:
            process = getattr(towers, kind.hosts)
            engine = Here(process(replace(settings, device=f"cuda:{2 - bundle}")), name, found)
            Here.made.append(engine)
            return engine

        monkeypatch.setattr(cell_towers, "start_tower", start_tower)
        yield found


def _settings(name: str, placement: str, **engine: Any) -> CellSettings:
    checkpoint = str((VENDORED / name).resolve())
    return CellSettings(checkpoint, "cuda", placement=placement, gpus_per_tower=0, engine=replace(ENGINE, **engine))


@asynccontextmanager
async def _cell(settings: CellSettings) -> AsyncIterator[RunningPair]:
    running = await start_pair(settings, None)  # type: ignore[arg-type]
    try:
        yield running
    finally:
        await running.close()


def _requests() -> list[Request]:
    params = DecodingParams(max_new_tokens=10, block_size=8, confidence_threshold=0.2, ignore_eos=True)
    return [Request(RequestId(mode), tuple(range(4, 40)), replace(params, mode=mode)) for mode in Mode]


async def _wanted(name: str) -> list[list[int]]:
    async with open_pair(VENDORED / name, ENGINE, "cpu") as pair:
        return [(await collect(pair, request)).token_ids for request in _requests()]


def _threads() -> set[str]:
    return {each.name for each in threading.enumerate() if each.name.startswith(("engine", "link"))}


_USUAL = {("tt_dense", "colocated", "on"), ("tt_dense", "split", "off")}  # split with captures is in the next test
_CASES = [
    pytest.param(*case, marks=[] if case in _USUAL else pytest.mark.long)
    for case in product(["tt_dense", "tt_moe"], ["split", "colocated"], ["off", "on"])
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "placement", "captured"), _CASES)
async def test_a_cell_from_loading_to_closing(
    name: str, placement: str, captured: str, machine: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In fp32, to have tokens to compare with; so small a pass has no grouped products.
    monkeypatch.setattr(capture, "grouped_products_wait", lambda *_: False)
    async with _cell(_settings(name, placement, capture=captured)) as running:
        assert [home["device"] for home in running.homes] == ["cuda:1", "cuda:0"][: len(running.homes)]
        assert {home["threads"] for home in running.homes} == {"1"}
        for engine in Here.made:
            tower = getattr(engine.actor, "_tower", None) or engine.actor.runner.engines[0].tower  # type: ignore[attr-defined]
            assert "attention" in tower.kernels and "heads folded" in tower.kernels, tower.kernels
        captures, uploads = machine.captures, machine.uploads
        decoded = await asyncio.gather(*(collect(running.pair, request) for request in _requests()))
        stats = await running.stats()
    assert [each.token_ids for each in decoded] == await _wanted(name)
    assert [each.tower for each in stats] == ["context", "denoiser"]
    assert bool(captures) == (captured == "on") and machine.captures == captures
    assert bool(machine.replays) == (captured == "on")
    assert machine.uploads > uploads and machine.device_waits == machine.foreign_uploads == 0
    assert len(ProcessGroupNCCL.groups) == (2 if placement == "split" else 0)
    assert all(engine.killed for engine in Here.made)
    assert _threads() == set()


@pytest.mark.slow
async def test_a_denoiser_that_lets_go_is_joined_again_with_its_captures(
    machine: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the next epoch, over a group of its own; the context tower forgets what was led over the old one."""
    monkeypatch.setattr(capture, "grouped_products_wait", lambda *_: False)
    async with _cell(_settings("tt_dense", "split", capture="on")) as running:
        captures = machine.captures
        running.pair.lose(0, Unavailable("for a test"))
        async with asyncio.timeout(60):
            while running.mended == 0 or running.served() != running.modes:
                await asyncio.sleep(0.01)
        decoded = await asyncio.gather(*(collect(running.pair, request) for request in _requests()))
        async with asyncio.timeout(10):  # a context tower hears late that the denoiser's last answer is whole
            while not all(_is_free(each) for each in await running.stats()):
                await asyncio.sleep(0.01)
    assert [each.token_ids for each in decoded] == await _wanted("tt_dense")
    assert machine.captures == captures > 0 and len(Here.made) == 2, "nothing was loaded or captured again"
    assert len(ProcessGroupNCCL.groups) == 4
    assert _threads() == set()


def _is_free(stats: EngineStats) -> bool:
    return (stats.free_slots, stats.free_pages) == (stats.total_slots, stats.total_pages)


@pytest.mark.slow
async def test_a_device_without_its_index_is_seen(machine: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "pick_device", lambda _: torch.device("cuda"))
    with pytest.raises(AssertionError, match="without an index"):
        await start_pair(_settings("tt_dense", "split"), None)  # type: ignore[arg-type]
    assert all(engine.killed for engine in Here.made)


@pytest.mark.slow
async def test_a_capture_after_the_link_has_joined_is_seen(machine: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A denoiser that leaves its passes to its engine makes them once it is connected."""
    links: list[Any] = []

    def connect(*given: Any) -> Any:
        links.append(towers_connect(*given))
        return links[0]

    towers_connect = towers.connect
    monkeypatch.setattr(towers, "connect", connect)
    monkeypatch.setattr(towers, "prepared_passes", lambda *_: None)
    with pytest.raises(AssertionError, match="a capture while serving"):
        await start_pair(_settings("tt_dense", "split", capture="on"), None)  # type: ignore[arg-type]
    await asyncio.to_thread(links[0].close)
    assert all(engine.killed for engine in Here.made)


@pytest.mark.parametrize(("placement", "full"), [("split", 0), ("split", 1), ("colocated", 1)])
@pytest.mark.slow
async def test_a_tower_that_does_not_fit_its_own_gpu(
    placement: str, full: int, machine: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one's free memory is no help; no tower reads a weight onto a GPU that is too full."""
    read: list[torch.device] = []
    load = loading._load
    monkeypatch.setattr(loading, "_load", lambda *given: (read.append(given[2]), load(*given))[1])
    machine.free[full] = 1 << 28
    with pytest.raises(ConfigError, match=rf"memory: got 0\.25 GiB free on cuda:{full}, wanted .* margin 0\.75"):
        await start_pair(_settings("tt_dense", placement), None)  # type: ignore[arg-type]
    assert torch.device("cuda", full) not in read
    assert all(engine.killed for engine in Here.made) and _threads() == set()


@pytest.mark.slow
async def test_a_self_test_that_fails_ends_every_tower(machine: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise Unavailable("self-test in ar mode failed: got 2 tokens, wanted 3")

    monkeypatch.setattr(cell, "self_test", broken)
    with pytest.raises(Unavailable, match="self-test in ar mode failed"):
        await start_pair(_settings("tt_dense", "split"), None)  # type: ignore[arg-type]
    assert all(engine.killed for engine in Here.made) and _threads() == set()
