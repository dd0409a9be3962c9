"""What `memory_of` says before anything is allocated is what is there afterwards, whatever the placement."""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import twotower
from tests.engine.arrangements import hooks_of
from tests.exchange.rig import QUICK, wait_until
from tests.goldens import CPU, GOLDEN_DIR, MODELS
from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.decoding.steering import Steering
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.ledger import Ledger
from twotower.engine.memory import Memory, memory_of, together
from twotower.engine.pair import Pair
from twotower.engine.passing import passing_bytes
from twotower.engine.runner import EngineRunner
from twotower.engine.settings import EngineSettings
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.local import LocalExchange
from twotower.exchange.settings import LinkSettings
from twotower.model.cache import TowerCache
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower.model.room import Room
from twotower.model.tower import ContextTower, DenoiserTower

DEMO = Path(twotower.__file__).parent / "demo" / "checkpoint"
CHECKPOINTS = [*(GOLDEN_DIR / name for name in MODELS), DEMO]
SETTINGS = EngineSettings(max_sequences=5, max_sequence_length=160, cache_tokens=500, prefill_chunk_tokens=64)
SMALL_LINK = replace(QUICK, staging_bytes=1024)
BOTH = (ContextTower, DenoiserTower)
_HALF = pytest.param(torch.bfloat16, marks=pytest.mark.slow)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, _HALF])


def _live() -> dict[int, int]:
    """Bytes of every storage of this process that a tensor refers to, by address."""
    gc.collect()
    storages: Iterator[torch.UntypedStorage] = (
        tensor.untyped_storage() for tensor in gc.get_objects() if type(tensor) in (torch.Tensor, torch.nn.Parameter)
    )
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.device.type == "cpu"}


def _allocated(before: dict[int, int]) -> int:
    return sum(nbytes for address, nbytes in _live().items() if before.get(address) != nbytes)


@pytest.fixture(params=CHECKPOINTS, ids=[*MODELS, "demo"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return Checkpoint.open(request.param)


@DTYPES
@pytest.mark.slow
def test_colocated(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    predicted = memory_of(checkpoint.config, SETTINGS, dtype, BOTH)
    before = _live()
    towers = load_context_tower(checkpoint, CPU, dtype), load_denoiser_tower(checkpoint, CPU, dtype)
    context = ContextEngine(towers[0], SETTINGS, print)
    exchange = LocalExchange(context.cache, lambda: None)
    denoiser = DenoiserEngine(towers[1], exchange.link, SETTINGS, print)
    assert _allocated(before) == predicted.total
    assert context.cache.nbytes == denoiser.link.cache.nbytes == predicted.slots + predicted.pages
    assert predicted.staging == 0


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "num_denoisers"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_split(checkpoint: Checkpoint, dtype: torch.dtype, num_denoisers: int) -> None:
    link = LinkSettings()
    predicted = [memory_of(checkpoint.config, SETTINGS, dtype, [ContextTower], num_denoisers, link)]
    predicted += [memory_of(checkpoint.config, SETTINGS, dtype, [DenoiserTower], 1, link)] * num_denoisers
    before = _live()
    with ExitStack() as ends:
        engine = ContextEngine(load_context_tower(checkpoint, CPU, dtype), SETTINGS, print)
        kept: list[object] = [engine]
        for number in range(num_denoisers):
            port, address = open_port(engine.cache, number, 0, link)
            ends.callback(port.close)
            tower = load_denoiser_tower(checkpoint, CPU, dtype)
            mirror = TowerCache(checkpoint.config, SETTINGS.max_sequences, SETTINGS.pages, CPU, dtype)
            joined = connect(address, mirror)
            ends.callback(joined.close)
            kept += [port, DenoiserEngine(tower, joined, SETTINGS, print)]
            wait_until(lambda port=port: port._pool)  # type: ignore[misc]  # the context side's, a moment later
        assert _allocated(before) == sum(memory.total for memory in predicted)
    assert [memory.staging for memory in predicted] == [3 * num_denoisers * 2**23, *[3 * 2**23] * num_denoisers]


def test_staging_buffers_grow_as_far_as_was_said() -> None:
    """Of links whose buffers are too small for any delta."""
    checkpoint = Checkpoint.open(DEMO)
    predicted = memory_of(checkpoint.config, SETTINGS, torch.float32, [DenoiserTower], 1, SMALL_LINK)
    sizes = asyncio.run(_sizes_after_use(checkpoint))
    each = predicted.staging // SMALL_LINK.staging_buffers
    assert max(sizes) > 10 * SMALL_LINK.staging_bytes
    assert 0.5 * each < max(sizes) <= each, "the longest prompt chunk fills a good part of it"


async def _sizes_after_use(checkpoint: Checkpoint) -> list[int]:
    """Bytes of the staging buffers at both ends of a link after a prompt of several chunks and wide blocks."""
    context, denoiser = (load(checkpoint, CPU, torch.float32) for load in (load_context_tower, load_denoiser_tower))
    runners = [EngineRunner(), EngineRunner()]
    engine = ContextEngine(context, SETTINGS, runners[0].emit)
    port, address = open_port(engine.cache, 0, 0, SMALL_LINK, hooks_of(runners[0]))
    engine.connect(port)
    runners[0].start([engine])
    mirror = TowerCache(checkpoint.config, SETTINGS.max_sequences, SETTINGS.pages, CPU, torch.float32)
    link = await asyncio.to_thread(connect, address, mirror, hooks_of(runners[1]))
    runners[1].start([DenoiserEngine(denoiser, link, SETTINGS, runners[1].emit)])
    rooms = [Room(SETTINGS.max_sequences, SETTINGS.pages) for _ in runners]
    params = DecodingParams(max_new_tokens=72, block_size=36, confidence_threshold=0.0, ignore_eos=True)
    request = Request(RequestId("r"), tuple(range(4, 84)), params)
    try:
        async with Pair(runners[0], runners[1:], Ledger(rooms[0], rooms[1:], 4)) as pair:
            assert [event async for event in pair.generate(request, 30)][-1].finish_reason
    finally:
        for runner in reversed(runners):
            await asyncio.to_thread(runner.stop)
    assert port._pool is not None
    return [buffer.flat.nbytes for pool in (port._pool, link._pool) for buffer in pool._free]


@pytest.mark.parametrize("tower", BOTH)
def test_what_penalties_keep_is_counted_where_they_are_kept(tower: type[ContextTower] | type[DenoiserTower]) -> None:
    """Of every sequence: the context tower decides the tokens of all modes that have penalties."""
    config = Checkpoint.open(DEMO).config
    penalised = DecodingParams(Mode.AR, 8, repetition_penalty=1.5)
    steering, before = Steering(penalised, config.eos_token_id, [5], [6]), _live()
    steering.change(torch.zeros(1, config.vocab_size), (), 0)
    one = _allocated(before) if tower is ContextTower else 0
    counted = memory_of(config, SETTINGS, torch.float32, [tower]).passing
    assert counted - passing_bytes(config, SETTINGS, torch.float32, [tower]) == SETTINGS.max_sequences * one
    assert one or tower is DenoiserTower


def test_prefixes_on_the_host_take_nothing_of_a_gpu() -> None:
    config, settings = Checkpoint.open(DEMO).config, EngineSettings()
    there = replace(settings, prefix_cache_in="host")
    usual, moved = (memory_of(config, one, torch.bfloat16, [ContextTower], on_gpu=True) for one in (settings, there))
    assert (usual.host, moved.prefixes) == (0, 0) and usual.total - moved.total == usual.prefixes > 0
    assert usual.prefixes <= moved.host < 2 * usual.prefixes, "pinned memory comes in powers of two"
    assert moved.host.bit_count() <= 2 and "on the host prefixes" in str(moved)
    assert memory_of(config, there, torch.bfloat16, [ContextTower]) == memory_of(
        config, settings, torch.bfloat16, [ContextTower]
    ), "on a CPU they are in the same memory"
    assert together([moved, usual]).host == moved.host


def test_the_line_in_the_log() -> None:
    memory = Memory(32, 131_072, 3 * 2**30, 2**30 + 2**29, 800, 5 * 2**20, 8192, 6 * 2**20, 7 * 2**20)
    assert str(memory) == (
        "32 sequences and 131072 tokens fit; 4.5 GiB: weights 3.0 GiB, slots 1.5 GiB, pages 800 B, staging 5.0 MiB, "
        "scratch 8.0 KiB, prefixes 6.0 MiB; beside it passing 7.0 MiB"
    )
