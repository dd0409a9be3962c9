"""A whole pair in this process: both towers on one device, one thread, local exchange. No Ray."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from twotower.config import ModelConfig
from twotower.device_names import check_dtype, parse_device
from twotower.engine.capture import check_capture
from twotower.engine.context.compiling import Compiling
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.free_memory import check_fits
from twotower.engine.ledger import Ledger
from twotower.engine.memory import memory_of
from twotower.engine.modes.block_steps import StepTrace
from twotower.engine.pair import Pair
from twotower.engine.runner import Engine, EngineRunner
from twotower.engine.settings import EngineSettings
from twotower.errors import ConfigError
from twotower.exchange.local import LocalExchange
from twotower.model.checkpoint import Checkpoint, Layout
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower.model.pages import page_tokens_on
from twotower.model.room import Room
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.model.transfer import current
from twotower.text.grammars import Grammars

logger = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """The device of a setting; `auto` is CUDA if there is a GPU. Raises ConfigError for a missing device.

    A CUDA device always has its index, even if the setting names none. Streams, NCCL's communicators and tensors are
    looked up by the index, and a device without one is not found.
    """
    wanted = parse_device(name)
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.kind == "cpu" or (wanted.kind == "auto" and seen == 0):
        return torch.device("cpu")
    if (wanted.index or 0) >= seen:
        raise ConfigError(f"device: got {name!r}, but this process sees {seen} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device() if wanted.index is None else wanted.index)


def pick_dtype(name: str) -> torch.dtype:
    """The dtype a setting names. Raises ConfigError."""
    check_dtype(name)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def colocated_runner(
    context: ContextTower,
    denoiser: DenoiserTower | None,
    settings: EngineSettings,
    trace: Callable[[StepTrace], None] | None = None,
    prepare: bool = False,
    checkpoint: Path | None = None,
) -> EngineRunner:
    """A started runner with both engines (or the context engine alone) over one cache.

    `prepare` takes a moment before the first request; it is meant for a process that serves many. `checkpoint`: the
    directory of the tokenizer for grammars; without it grammars are not served.
    """
    runner = EngineRunner(settings.stall_timeout_s)
    with current(context.device):
        grammars = grammars_of(checkpoint, context.config)
        context_engine = ContextEngine(context, settings, runner.emit, Compiling(grammars, runner.wake))
        if prepare:
            context_engine.prepare()
        engines: list[Engine] = [context_engine]
        if denoiser is not None:
            exchange = LocalExchange(context_engine.cache, runner.wake)
            context_engine.connect(exchange.port)
            compiling = Compiling(grammars, runner.wake)
            denoiser_engine = DenoiserEngine(denoiser, exchange.link, settings, runner.emit, trace, compiling=compiling)
            if prepare:
                denoiser_engine.prepare()
            engines.append(denoiser_engine)
    runner.start(engines, context.device)
    return runner


def grammars_of(checkpoint: Path | None, config: ModelConfig) -> Grammars | None:
    """None without a checkpoint."""
    return None if checkpoint is None else Grammars(checkpoint, config.vocab_size, config.eos_token_id)


@asynccontextmanager
async def pair_of(
    context: ContextTower,
    denoiser: DenoiserTower | None,
    settings: EngineSettings,
    trace: Callable[[StepTrace], None] | None = None,
    prepare: bool = False,
    checkpoint: Path | None = None,
) -> AsyncIterator[Pair]:
    """A running pair over towers that are already loaded; `prepare` and `checkpoint` as for `colocated_runner`."""
    runner = colocated_runner(context, denoiser, settings, trace, prepare, checkpoint)
    page_tokens = page_tokens_on(context.device.type)
    room = Room(settings.max_sequences, settings.pages_of(page_tokens), page_tokens=page_tokens)
    ledger = Ledger(room, [], settings.max_queued_requests, stride=settings.prefix_stride_of(page_tokens))
    try:
        async with Pair(runner, [runner] if denoiser is not None else [], ledger) as pair:
            yield pair
    finally:
        runner.stop()


@asynccontextmanager
async def open_pair(
    checkpoint: Path | str,
    settings: EngineSettings,
    device: str = "auto",
    dtype: str = "float32",
    progress: bool = False,
) -> AsyncIterator[Pair]:
    """Load a checkpoint and run a pair on it. A base checkpoint gives a pair that serves `ar` only.

    Raises CheckpointError, or ConfigError for a device that is missing or has too little memory left.
    """
    opened = Checkpoint.open(checkpoint, settings.expert_format)
    where, kind = pick_device(device), pick_dtype(dtype)
    hosted = (ContextTower, DenoiserTower) if opened.layout is Layout.TWO_TOWER else (ContextTower,)
    memory = memory_of(opened.config, settings, kind, hosted, on_gpu=where.type == "cuda")
    logger.info("one process on %s: %s", where, memory)
    check_fits(memory, where)
    check_capture(settings.capture, opened.config, where, kind)
    denoiser = None
    with current(where):
        context = load_context_tower(opened, where, kind, progress)
        if opened.layout is Layout.TWO_TOWER:
            denoiser = load_denoiser_tower(opened, where, kind, progress)
    async with pair_of(context, denoiser, settings, checkpoint=opened.directory) as pair:
        yield pair
