"""The tower processes of one cell: started in their bundles, joined to each other, and replaced when lost.

Knows nothing of requests; Ray's own calls are in `remote.py`.
"""

import asyncio
import logging
from collections.abc import Iterable

from ray.util.placement_group import PlacementGroup

from actors.hosts import ColocatedActor, ContextActor, DenoiserActor, Host
from actors.remote import RemoteEngine, start_tower
from actors.settings import CellSettings
from twotower.device_names import parse_device
from twotower.errors import TwoTowerError

logger = logging.getLogger(__name__)

_LET_GO_S = 5.0
_PROBE_S = 3.0


class CellTowers:
    """`engines`: the context tower's process first; a single process hosts both towers."""

    def __init__(self, settings: CellSettings, group: PlacementGroup) -> None:
        self._settings, self._group = settings, group
        self.engines: list[RemoteEngine] = []
        self.homes: list[dict[str, str]] = []
        self._epochs = [0] * settings.denoisers_per_context

    @property
    def context(self) -> RemoteEngine:
        return self.engines[0]

    @property
    def denoisers(self) -> list[RemoteEngine]:
        """Empty for `ar_only`."""
        if self._settings.placement == "split":
            return self.engines[1:]
        return self.engines[:] if self._settings.placement == "colocated" else []

    async def start(self) -> None:
        """All processes with their weights, joined. Raises a TwoTowerError."""
        self.engines = [self._begin(number) for number in range(self._settings.processes)]
        self.homes = [{} for _ in self.engines]
        if parse_device(self._settings.device).kind == "cpu":
            await self.context.call("check_room", timeout_s=self._settings.engine.start_timeout_s)
        await self._load(range(len(self.engines)))
        await self._connect()

    async def start_again(self) -> None:
        """After the loss of the context tower: start another; living denoisers keep their weights. Raises a
        TwoTowerError.
        """
        alive = await asyncio.gather(*(self._can_be_joined(engine) for engine in self.engines[1:]))
        await self._replace([0, *(1 + index for index, lives in enumerate(alive) if not lives)])
        await self._connect()

    async def part(self, denoiser: int) -> None:
        """After the loss of a denoiser: it drops its link or ends, and the context tower releases its sequences. Raises
        a TwoTowerError.
        """
        engine = self.engines[1 + denoiser]
        if not await self._can_be_joined(engine):
            engine.kill()
            engine.close_line()
        await self.context.call("forget_link", denoiser)

    async def renew(self, denoiser: int) -> RemoteEngine:
        """After `part`: join its process again if it lacks only a link, or start another one. Raises a
        TwoTowerError.
        """
        number = 1 + denoiser
        if not await self._can_be_joined(self.engines[number]):
            await self._replace([number])
        await self._join(denoiser)
        return self.engines[number]

    async def context_answers(self) -> bool:
        """Whether the context tower and its engine live."""
        try:
            await self.context.call("stats", timeout_s=_PROBE_S)
        except TwoTowerError:
            return False
        return self.context.speaks

    def kill(self) -> None:
        """Kill the processes."""
        for engine in self.engines:
            engine.kill()
        for engine in self.engines:
            engine.close_line()

    def _begin(self, number: int) -> RemoteEngine:
        """Start a process without weights in its bundle; the replica itself is in the first bundle."""
        kind, name = self._kind(number)
        return start_tower(kind, self._settings, self._group, 1 + number, name)

    def _kind(self, number: int) -> tuple[type[Host], str]:
        if self._settings.placement != "split":
            return ColocatedActor, f"{self._settings.placement} tower"
        return (ContextActor, "context tower") if number == 0 else (DenoiserActor, f"denoiser tower {number - 1}")

    async def _replace(self, numbers: Iterable[int]) -> None:
        lost = [*numbers]
        for number in lost:
            self.engines[number].kill()
            self.engines[number].close_line()
            self.engines[number] = self._begin(number)
        await self._load(lost)

    async def _load(self, numbers: Iterable[int]) -> None:
        wanted = [*numbers]
        patience = self._settings.engine.start_timeout_s
        loaded = await asyncio.gather(*(self.engines[number].load(patience) for number in wanted))
        for number, told in zip(wanted, loaded, strict=True):
            self.homes[number] = told
            logger.info("%s is ready: %s", self.engines[number].name, self.homes[number])

    async def _connect(self) -> None:
        await self.context.open_line()
        for index in range(len(self.engines) - 1):
            await self._join(index)

    async def _join(self, denoiser: int) -> None:
        """Open the next epoch of its link to the context tower, and its line."""
        self._epochs[denoiser] += 1
        engine = self.engines[1 + denoiser]
        address = await self.context.call("open_link", denoiser, self._epochs[denoiser])
        await engine.call("connect", address, timeout_s=self._settings.engine.start_timeout_s)
        await engine.open_line()

    async def _can_be_joined(self, denoiser: RemoteEngine) -> bool:
        """Whether it lacks only a link."""
        if not denoiser.speaks:
            return False
        try:
            lets_go: bool = await denoiser.call("let_go", timeout_s=_LET_GO_S)
            return lets_go
        except TwoTowerError as error:
            logger.warning("the %s process is given up: %s", denoiser.name, error)
            return False
