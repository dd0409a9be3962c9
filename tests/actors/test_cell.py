"""Cells of real Ray actors: the same tokens as in process, pinned GPUs, and a clear end when a process dies.

Tests that stand one after the other and want the same cell share it, as long as it is whole.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import ray
from ray.util.placement_group import placement_group, remove_placement_group

import twotower
from actors.cell import RunningPair, start_pair
from actors.settings import STRATEGY, CellSettings, bundles
from tests.engine.decode import collect
from tests.goldens import VENDORED, causal_request, diffusion_request, vendored
from twotower.core import DecodingParams, Mode, Request, RequestId, ScoreRequest
from twotower.engine.in_process import open_pair
from twotower.engine.settings import EngineSettings
from twotower.errors import CheckpointError, ConfigError, TwoTowerError, Unavailable
from twotower.text.tokenizer import PretrainedTokenizer

pytestmark = [
    pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.asyncio(loop_scope="module"),
]  # fmt: skip

DEMO = Path(twotower.__file__).parent / "demo" / "checkpoint"
DEMO_PROMPTS = ("words: 2009\n", "json: age=26 city=delhi pet=owl name=bob\n", "roman: 1987\n")
# Recording passes takes a process seconds; the demo below is decoded with recorded ones.
ENGINE = EngineSettings(16, 256, prefill_chunk_tokens=16, link_timeout_s=4, capture="off")


@asynccontextmanager
async def cell(checkpoint: str | Path, placement: str = "split", **changes: Any) -> AsyncIterator[RunningPair]:
    directory = str((VENDORED / checkpoint).resolve())
    engine = changes.pop("engine", ENGINE)
    settings = CellSettings(directory, device="cpu", placement=placement, gpus_per_tower=1, engine=engine, **changes)
    group = placement_group(bundles(settings), strategy=STRATEGY)
    await group.ready()
    try:
        running = await start_pair(settings, group)
        try:
            yield running
        finally:
            pids = _pids(running)
            await running.close()
        assert await _gone(pids), "a tower process outlived its cell"
    finally:
        remove_placement_group(group)


class Cells:
    """The cell that was asked for last; whoever asks for the same has it too."""

    def __init__(self) -> None:
        self._open, self._asked = AsyncExitStack(), ""
        self._running: RunningPair | None = None

    async def of(self, checkpoint: str | Path, placement: str = "split", **changes: Any) -> RunningPair:
        """A whole one."""
        asked = f"{checkpoint} {placement} {changes}"
        if self._running is None or asked != self._asked or self._running.served() != self._running.modes:
            await self.close()
            self._running, self._asked = (
                await self._open.enter_async_context(cell(checkpoint, placement, **changes)),
                asked,
            )
        return self._running

    async def close(self) -> None:
        self._running = None
        await self._open.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cells(ray_cluster: None) -> AsyncIterator[Cells]:
    cells = Cells()
    yield cells
    await cells.close()


def _golden_requests(name: str, modes: tuple[Mode, ...]) -> list[tuple[Request, list[int]]]:
    wanted = []
    for number, prompt in enumerate(vendored(name).prompts):
        cases = [case for case in prompt["cases"] if case["eos_token_id"] is None]
        causal = (Mode.AR, Mode.MOCK_AR, Mode.VERIFIED, Mode.AUTO)
        of_this = [(causal_request(prompt, mode), prompt[str(mode)]["tokens"]) for mode in causal]
        of_this += [(diffusion_request(prompt, case), case["output"]) for case in cases]
        of_this = [(request, tokens) for request, tokens in of_this if request.params.mode in modes]
        assert {request.params.mode for request, _ in of_this} == set(modes), number
        assert all(tokens for _, tokens in of_this), number
        wanted += of_this
    return wanted


async def _all_free(running: RunningPair, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while True:
        stats = await running.stats()
        if all((s.sequences, s.free_slots, s.free_pages) == (0, s.total_slots, s.total_pages) for s in stats):
            return
        assert time.monotonic() < deadline, f"not everything was given back: {stats}"
        await asyncio.sleep(0.05)


async def test_a_colocated_process_is_replaced(cells: Cells) -> None:
    running = await cells.of("tt_moe", "colocated", denoisers_per_context=1)
    for _ in range(2):
        pids = _pids(running)
        os.kill(pids[0], signal.SIGKILL)
        assert await _gone(pids)
        while running.served():
            await asyncio.sleep(0.01)
        assert await _whole(running)
    assert running.mended == 2 and running.failure() is None
    await _all_free(running)


@pytest.mark.parametrize(
    ("name", "placement", "denoisers"),
    [("tt_moe", "colocated", 1), ("tt_moe", "ar_only", 1), ("tt_dense", "split", 1), ("tt_moe", "split", 2)],
)
async def test_golden_tokens_in_every_placement(cells: Cells, name: str, placement: str, denoisers: int) -> None:
    modes = (Mode.AR,) if placement == "ar_only" else tuple(Mode)
    wanted = _golden_requests(name, modes)
    running = await cells.of(name, placement, denoisers_per_context=denoisers)
    results = await asyncio.gather(*(collect(running.pair, request) for request, _ in wanted))
    assert [result.token_ids for result in results] == [tokens for _, tokens in wanted]
    await _scores_are_the_prompts_own(running, name)
    await _leave_streams(running, modes)
    await _all_free(running)
    _each_process_has_a_gpu_of_its_own(running, 1 + denoisers if placement == "split" else 1)


async def test_another_denoiser_serves_while_one_is_replaced(cells: Cells) -> None:
    running = await cells.of("tt_moe", "split", denoisers_per_context=2)
    os.kill(_pids(running)[1], signal.SIGKILL)
    while not running.pair.lost:
        await asyncio.sleep(0.005)
    assert running.served() == tuple(Mode)
    assert (await collect(running.pair, _long_request(Mode.DIFFUSION))).token_ids
    assert await _whole(running)
    await _all_free(running)


async def _scores_are_the_prompts_own(running: RunningPair, name: str) -> None:
    for prompt in vendored(name).prompts:
        tokens = tuple(prompt["tokens"])
        log_probs_LV = vendored(name).tensors[f"{prompt['id']}.ctx_logits"].log_softmax(-1)
        wanted = [log_probs_LV[place, token].item() for place, token in enumerate(tokens[1:])]
        event = await running.pair.score(ScoreRequest(RequestId(f"score-{prompt['id']}"), tokens, 1), 20)
        assert event.log_probs == pytest.approx(wanted, abs=1e-3)


async def _leave_streams(running: RunningPair, modes: tuple[Mode, ...]) -> None:
    """Walk away from a request of each mode after its first event."""
    for mode in modes:
        stream = running.pair.generate(_long_request(mode))
        assert (await anext(stream)).token_ids
        await stream.aclose()


@pytest.mark.parametrize("placement", ["split", "colocated"])
async def test_the_demo_in_processes_of_its_own_gives_the_tokens_of_this_one(placement: str) -> None:
    """And each stays below half a gigabyte. Some 300 MB are torch, Ray and Python; the rest is recorded passes, the
    cache, and 15 MB of weights for both towers. One process of both records twice as many passes as one of one. Without
    kept prefixes: their states have a bound of their own.
    """
    requests = [_demo_request(text, mode) for text in DEMO_PROMPTS for mode in Mode]
    async with open_pair(DEMO, ENGINE, "cpu") as pair:
        wanted = [(await collect(pair, request)).token_ids for request in requests]
    without = replace(ENGINE, capture="auto", prefix_cache_bytes=0)
    async with cell(DEMO, placement, engine=without) as running:
        assert all("tokens fit" in home["memory"] for home in running.homes)
        results = await asyncio.gather(*(collect(running.pair, request) for request in requests))
        taken = [psutil.Process(pid).memory_info().rss for pid in _pids(running)]
    assert [result.token_ids for result in results] == wanted
    assert max(taken) < 500e6, f"a demo tower's process takes {max(taken) / 1e6:.0f} MB"


def _demo_request(text: str, mode: Mode) -> Request:
    prompt = PretrainedTokenizer(DEMO).encode(text)
    params = DecodingParams(mode=mode, max_new_tokens=40, temperature=0.0 if "words" in text else 0.7, seed=11)
    return Request(RequestId(f"{text}{mode}"), tuple(prompt), params)


def _each_process_has_a_gpu_of_its_own(running: RunningPair, processes: int) -> None:
    seen = [home["cuda_visible_devices"] for home in running.homes]
    assert len(set(seen)) == processes
    assert all(devices and "," not in devices for devices in seen)
    assert len({home["pid"] for home in running.homes}) == processes


def _long_request(mode: Mode) -> Request:
    params = (
        DecodingParams(mode=mode, max_new_tokens=200, ignore_eos=True, confidence_threshold=1.0)
        if (mode is Mode.DIFFUSION)
        else DecodingParams(mode=mode, max_new_tokens=200, ignore_eos=True)
    )
    return Request(RequestId(f"long-{mode}"), (1, 5, 9), params)


BLOWS = pytest.mark.parametrize(
    ("victim", "blow"),
    [(0, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGKILL), (1, signal.SIGSTOP)],
    ids=lambda it: it.name if isinstance(it, signal.Signals) else ("context", "denoiser")[it],
)
SILENCE_S = 6.0
# A process that dies is missed long before its silence is noticed, also on a busy machine; one that hangs soon after.
MISSED_S = {signal.SIGKILL: SILENCE_S - 2, signal.SIGSTOP: SILENCE_S + 4}


@BLOWS
async def test_a_dead_or_hung_tower_is_replaced_and_nobody_else_is(
    cells: Cells, victim: int, blow: signal.Signals
) -> None:
    running = await cells.of("tt_moe", engine=replace(ENGINE, link_timeout_s=SILENCE_S))
    pids = _pids(running)
    tasks = {mode: asyncio.create_task(collect(running.pair, _long_request(mode))) for mode in Mode}
    await asyncio.sleep(0.05)
    struck = time.monotonic()
    os.kill(pids[victim], blow)
    with pytest.raises(Unavailable) as told:
        await asyncio.wait_for(tasks[Mode.DIFFUSION], 20)
    assert time.monotonic() - struck < MISSED_S[blow]
    assert "\n" not in str(told.value)
    await _says_what_it_serves(running, (Mode.AR,) if victim == 1 else ())
    if victim == 1:
        assert (await asyncio.wait_for(tasks[Mode.AR], 20)).token_ids, "the context tower serves on"
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert await _whole(running) and running.failure() is None
    now = _pids(running)
    assert (now[victim] != pids[victim]) and now[1 - victim] == pids[1 - victim], "the living one keeps its weights"
    assert await _gone([pids[victim]])
    wanted = _golden_requests("tt_moe", tuple(Mode))
    results = await asyncio.gather(*(collect(running.pair, request) for request, _ in wanted))
    assert [result.token_ids for result in results] == [tokens for _, tokens in wanted]
    await _all_free(running)


async def _says_what_it_serves(running: RunningPair, modes: tuple[Mode, ...]) -> None:
    """Of a dead context tower the denoiser may say first that its link is gone; the cell hears more at once."""
    async with asyncio.timeout(5):
        while not modes and running.served() == (Mode.AR,):
            await asyncio.sleep(0.005)
    assert running.served() == modes


async def test_a_cell_that_cannot_be_mended_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cell("tt_moe", engine=replace(ENGINE, mend_timeout_s=2.0)) as running:
        monkeypatch.setattr(running._towers, "_begin", _no_process)
        os.kill(_pids(running)[0], signal.SIGKILL)
        async with asyncio.timeout(20):
            while running.failure() is None:
                await asyncio.sleep(0.05)
        assert running.failure() == "not mended within 2 s: no process today"
        assert running.served() == ()


def _no_process(place: int) -> None:
    raise Unavailable("no process today")


def _pids(running: RunningPair) -> list[int]:
    return [int(home["pid"]) for home in running.homes]


async def _whole(running: RunningPair, within_s: float = 90.0) -> bool:
    async with asyncio.timeout(within_s):
        while running.served() != running.modes or running.pair.lost:
            await asyncio.sleep(0.05)
    return True


async def _gone(pids: list[int]) -> bool:
    for _ in range(50):
        if not any(_alive(pid) for pid in pids):
            return True
        await asyncio.sleep(0.1)
    return False


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"checkpoint": "/nowhere"}, CheckpointError, "/nowhere: no such directory"),
        ({"dtype": "float8"}, ConfigError, "dtype: got 'float8'"),
        ({"device": "cuda"}, ConfigError, "device: got 'cuda'"),
    ],
)
async def test_a_cell_that_cannot_start_says_why(
    cells: Cells, changes: dict[str, str], error: type[TwoTowerError], said: str
) -> None:
    await cells.close()  # which has GPUs
    directory = str((VENDORED / "tt_moe").resolve())
    settings = CellSettings(**{"checkpoint": directory, "device": "cpu", "gpus_per_tower": 1, **changes})  # type: ignore[arg-type]
    group = placement_group(bundles(settings), strategy=STRATEGY)
    await group.ready()
    try:
        with pytest.raises(error, match=said):
            await start_pair(settings, group)
    finally:
        remove_placement_group(group)
    deadline = time.monotonic() + 5
    while ray.available_resources().get("GPU") != ray.cluster_resources()["GPU"]:
        assert time.monotonic() < deadline, "GPUs were not given back"
        await asyncio.sleep(0.1)
