"""Cells of real Ray actors: the same tokens as in process, pinned GPUs, and a clear end when a process dies."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

import twotower
from actors.cell import RunningPair, start_pair
from actors.settings import STRATEGY, CellSettings, bundles
from tests.engine.decode import collect
from tests.goldens import VENDORED, causal_request, diffusion_request, vendored
from twotower.core import DecodingParams, Mode, Request, RequestId, ScoreRequest
from twotower.decoding.tokenizer import PretrainedTokenizer
from twotower.engine.in_process import open_pair
from twotower.engine.settings import EngineSettings
from twotower.errors import CheckpointError, ConfigError, TwoTowerError, Unavailable

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

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
            await running.close()
    finally:
        remove_placement_group(group)


def _golden_requests(name: str, modes: tuple[Mode, ...]) -> list[tuple[Request, list[int]]]:
    wanted = []
    for number, prompt in enumerate(vendored(name).prompts):
        cases = [case for case in prompt["cases"] if case["eos_token_id"] is None]
        of_this = [(causal_request(prompt, mode), prompt[str(mode)]["tokens"]) for mode in (Mode.AR, Mode.MOCK_AR)]
        of_this += [(diffusion_request(prompt, case), case["output"]) for case in cases]
        of_this = [(request, tokens) for request, tokens in of_this if request.params.mode in modes]
        assert {request.params.mode for request, _ in of_this} == set(modes), number
        assert all(tokens for _, tokens in of_this), number
        wanted += of_this
    return wanted


async def _all_free(running: RunningPair, within_s: float = 3.0) -> None:
    deadline = time.monotonic() + within_s
    while True:
        stats = await running.stats()
        if all((s.sequences, s.free_slots, s.free_pages) == (0, s.total_slots, s.total_pages) for s in stats):
            return
        assert time.monotonic() < deadline, f"not everything was given back: {stats}"
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "placement", "denoisers"),
    [("tt_dense", "split", 1), ("tt_moe", "split", 2), ("tt_moe", "colocated", 1), ("tt_moe", "ar_only", 1)],
)
async def test_golden_tokens_in_every_placement(name: str, placement: str, denoisers: int) -> None:
    modes = (Mode.AR,) if placement == "ar_only" else tuple(Mode)
    wanted = _golden_requests(name, modes)
    async with cell(name, placement, denoisers_per_context=denoisers) as running:
        results = await asyncio.gather(*(collect(running.pair, request) for request, _ in wanted))
        assert [result.token_ids for result in results] == [tokens for _, tokens in wanted]
        await _scores_are_the_prompts_own(running, name)
        await _leave_streams(running, modes)
        await _all_free(running)
        _each_process_has_a_gpu_of_its_own(running, 1 + denoisers if placement == "split" else 1)


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


async def test_the_demo_over_two_processes_gives_the_tokens_of_one() -> None:
    requests = [_demo_request(text, mode) for text in DEMO_PROMPTS for mode in Mode]
    async with open_pair(DEMO, ENGINE, "cpu") as pair:
        wanted = [(await collect(pair, request)).token_ids for request in requests]
    async with cell(DEMO, engine=replace(ENGINE, capture="auto")) as running:
        assert all("tokens fit" in place["memory"] for place in running.places)
        results = await asyncio.gather(*(collect(running.pair, request) for request in requests))
        taken = [psutil.Process(int(place["pid"])).memory_info().rss for place in running.places]
    assert [result.token_ids for result in results] == wanted
    assert max(taken) < 500e6, f"a demo tower's process takes {max(taken) / 1e6:.0f} MB"


def _demo_request(text: str, mode: Mode) -> Request:
    prompt = PretrainedTokenizer(DEMO).encode(text)
    params = DecodingParams(mode=mode, max_new_tokens=40, temperature=0.0 if "words" in text else 0.7, seed=11)
    return Request(RequestId(f"{text}{mode}"), tuple(prompt), params)


def _each_process_has_a_gpu_of_its_own(running: RunningPair, processes: int) -> None:
    seen = [place["cuda_visible_devices"] for place in running.places]
    assert len(set(seen)) == processes
    assert all(devices and "," not in devices for devices in seen)
    assert len({place["pid"] for place in running.places}) == processes


def _long_request(mode: Mode) -> Request:
    params = (
        DecodingParams(mode=mode, max_new_tokens=200, ignore_eos=True, confidence_threshold=1.0)
        if (mode is Mode.DIFFUSION)
        else DecodingParams(mode=mode, max_new_tokens=200, ignore_eos=True)
    )
    return Request(RequestId(f"long-{mode}"), (1, 5, 9), params)


@pytest.mark.parametrize(("victim", "blow"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
async def test_a_dead_or_hung_process_ends_every_request_with_a_clear_error(victim: int, blow: signal.Signals) -> None:
    async with cell("tt_moe") as running:
        tasks = [asyncio.create_task(collect(running.pair, _long_request(mode))) for mode in Mode]
        await asyncio.sleep(0.05)
        struck = time.monotonic()
        os.kill(int(running.places[victim]["pid"]), blow)
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        ended = time.monotonic() - struck
        failures = [o for o in outcomes if isinstance(o, BaseException)]
        assert failures, "the requests finished before the blow fell"
        assert all(isinstance(o, Unavailable) for o in failures), failures
        assert all("\n" not in str(o) for o in failures)
        assert ended < (2 if blow is signal.SIGKILL else ENGINE.link_timeout_s + 2)
        assert await _eventually_failed(running)
        with pytest.raises(Unavailable):
            await collect(running.pair, _long_request(Mode.AR))
        pids = [int(place["pid"]) for place in running.places]
    assert await _gone(pids), "a tower process outlived its cell"


async def _eventually_failed(running: RunningPair) -> bool:
    for _ in range(int(ENGINE.link_timeout_s * 10) + 20):
        if running.failure() is not None:
            return True
        await asyncio.sleep(0.1)
    return False


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
    changes: dict[str, str], error: type[TwoTowerError], said: str
) -> None:
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
