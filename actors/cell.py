"""A cell: the tower processes of one replica pair, put together, tested, and watched.

Placement and failure live here; Ray's own calls in `remote.py`; what the towers do in the library.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import torch
from ray.util.placement_group import PlacementGroup

from actors.memory import memories
from actors.remote import RemoteEngine, start_tower
from actors.settings import CellSettings
from actors.towers import ColocatedActor, ContextActor, DenoiserActor
from twotower.core import Mode
from twotower.device_names import parse_device
from twotower.engine.expectation import Expectation
from twotower.engine.free_memory import check_fits
from twotower.engine.handle import EngineStats
from twotower.engine.in_process import pick_dtype
from twotower.engine.ledger import Ledger, Room
from twotower.engine.memory import together
from twotower.engine.pair import Pair
from twotower.engine.self_test import self_test
from twotower.errors import ConfigError, TwoTowerError
from twotower.model.checkpoint import Checkpoint, Layout

logger = logging.getLogger(__name__)

_FIRST_EPOCH = 1


@dataclass
class RunningPair:
    """A pair whose towers run in processes of their own."""

    pair: Pair
    engines: list[RemoteEngine]
    places: list[dict[str, str]] = field(default_factory=list)
    fingerprint: str = ""

    def failure(self) -> str | None:
        """Why this cell cannot serve any more, for a health check; None while it can."""
        return None if self.pair.failure is None else str(self.pair.failure)

    async def stats(self) -> list[EngineStats]:
        """Counters of every tower."""
        per_process = await asyncio.gather(*(engine.stats() for engine in self.engines))
        return [stats for process in per_process for stats in process]

    async def close(self) -> None:
        """Fail what still runs and end the tower processes."""
        await self.pair.close()
        for engine in self.engines:
            engine.kill()
        for engine in self.engines:
            await engine.close_line()


def check_settings(settings: CellSettings, asked: str | None = None) -> tuple[Mode, ...]:
    """The modes a cell of these settings serves. Raises CheckpointError or ConfigError before anything is started.

    `asked`: the placement in the user's words, where it is not the settings' own.
    """
    pick_dtype(settings.dtype)
    checkpoint = Checkpoint.open(settings.checkpoint)
    if settings.placement != "ar_only" and checkpoint.layout is not Layout.TWO_TOWER:
        raise ConfigError(
            f"placement: got {(asked or settings.placement)!r} for a {checkpoint.layout} checkpoint, wanted 'ar_only'"
        )
    return (Mode.AR,) if settings.placement == "ar_only" else checkpoint.modes


async def start_pair(settings: CellSettings, group: PlacementGroup) -> RunningPair:
    """Start a cell's towers in bundles 1… of its placement group, join them, and try them out.

    Raises a TwoTowerError that says what is wrong; then no process is left behind.
    """
    modes, expected = check_settings(settings), Expectation.load(settings.checkpoint)
    wanted = memories(settings)
    if parse_device(settings.device).kind == "cpu":
        check_fits(together(wanted), torch.device("cpu"))  # one memory for all of them, before any has taken its part
    engines = _start_towers(settings, group)
    for engine, memory in zip(engines, wanted, strict=True):
        logger.info("%s: %s", engine.name, memory)
    async with _ended_on_failure(engines):
        patience = settings.engine.start_timeout_s
        places = await asyncio.gather(*(engine.load(patience) for engine in engines))
        for engine, place, memory in zip(engines, places, wanted, strict=True):
            place["memory"] = str(memory)
            logger.info("%s is ready: %s", engine.name, place)
        context, *denoisers = engines
        for link, denoiser in enumerate(denoisers):
            await _join(context, denoiser, link, _FIRST_EPOCH, patience)
        await asyncio.gather(*(engine.open_line() for engine in engines))
        pair = Pair(context, denoisers or _own_denoiser(settings, context), _ledger(settings))
        pair.start()
        running = RunningPair(pair, engines, list(places), Checkpoint.open(settings.checkpoint).fingerprint)
        try:
            await self_test(pair, modes, patience, expected)
        except TwoTowerError:
            await pair.close()
            raise
        return running


def _start_towers(settings: CellSettings, group: PlacementGroup) -> list[RemoteEngine]:
    if settings.placement != "split":
        return [start_tower(ColocatedActor, settings, group, 1, f"{settings.placement} tower")]
    engines = [start_tower(ContextActor, settings, group, 1, "context tower")]
    for number in range(settings.denoisers_per_context):
        engines.append(start_tower(DenoiserActor, settings, group, 2 + number, f"denoiser tower {number}"))
    return engines


async def _join(context: RemoteEngine, denoiser: RemoteEngine, link: int, epoch: int, patience: float) -> None:
    address = await context.call("open_link", link, epoch)
    await denoiser.call("connect", address, timeout_s=patience)


def _own_denoiser(settings: CellSettings, context: RemoteEngine) -> list[RemoteEngine]:
    return [context] if settings.placement == "colocated" else []


def _ledger(settings: CellSettings) -> Ledger:
    engine = settings.engine
    mirrors = settings.denoisers_per_context if settings.placement == "split" else 0
    rooms = [Room(engine.max_sequences, engine.pages) for _ in range(1 + mirrors)]
    return Ledger(rooms[0], rooms[1:], engine.max_queued_requests)


@contextlib.asynccontextmanager
async def _ended_on_failure(engines: list[RemoteEngine]) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        for engine in engines:
            engine.kill()
        for engine in engines:
            await engine.close_line()
        raise
