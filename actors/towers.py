"""The tower processes: plain classes that load a tower and run it with an engine and a thread.

Ray's actors host them (`actors/hosts.py`), and tests construct them directly. Their methods set up the cell and return
counters; requests and events use the line.
"""

import asyncio
import ctypes
import logging
import os
import time

import torch

import twotower
from actors.loading_progress import reported
from actors.memory import memories
from actors.process_logs import log_to_stderr
from actors.settings import CellSettings
from actors.tower_line import TowerLine
from twotower.engine.capture import check_capture
from twotower.engine.context.compiling import Compiling
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine, prepared_passes
from twotower.engine.free_memory import check_fits
from twotower.engine.handle import EngineStats
from twotower.engine.in_process import colocated_runner, grammars_of, pick_device, pick_dtype
from twotower.engine.memory import Memory, together
from twotower.engine.runner import EngineRunner
from twotower.errors import LinkDown
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.distributed_link import DistributedLink
from twotower.exchange.distributed_port import DistributedPort
from twotower.exchange.settings import EngineHooks, LinkAddress
from twotower.exchange.staging import fitted
from twotower.model.cache import TowerCache
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower.model.pages import page_tokens_on
from twotower.model.threads import threads_for
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.model.transfer import current
from twotower.transport.handshake import Address

logger = logging.getLogger(__name__)

_SOON_S = 0.005
_LET_GO_S = 3.0


def give_back_freed() -> None:
    """Return memory freed by loading to the system, if the C library can; otherwise it would keep some megabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class TowerProcess:
    """The common part of tower processes: load, run the engines, report the home. `number`: its number within the cell;
    the context tower's is 0.

    Loading is a separate call and not part of the constructor. So its error arrives unchanged, and not as a failed
    construction of the actor.
    """

    number = 0

    def __init__(self, settings: CellSettings) -> None:
        self.settings = settings
        self.runner = EngineRunner(settings.engine.stall_timeout_s)

    async def check_room(self) -> None:
        """Called before any process of a CPU cell allocates its part of the shared memory. Raises ConfigError if there
        is too little left for all of them, or CheckpointError.
        """
        await asyncio.to_thread(lambda: check_fits(together(memories(self.settings)), torch.device("cpu")))

    async def load(self) -> dict[str, str]:
        """Load the weights; returns this process's home. Raises CheckpointError, or ConfigError for a device that is
        missing or has too little memory left.
        """
        log_to_stderr()
        self.checkpoint = Checkpoint.open(self.settings.checkpoint, self.settings.engine.expert_format)
        torch.set_num_threads(threads_for(self.checkpoint.config, self.settings.cores))
        self.device = pick_device(self.settings.device)
        self.dtype = pick_dtype(self.settings.dtype)
        memory = memories(self.settings)[self.number]
        logger.info("%s", memory)
        await asyncio.to_thread(self._load_what_fits, memory)
        return {
            "tower": type(self).__name__,
            "pid": str(os.getpid()),
            "device": str(self.device),
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "threads": str(torch.get_num_threads()),
            "library": os.path.dirname(os.path.abspath(twotower.__file__)),
            "memory": str(memory),
        }

    def _load_what_fits(self, memory: Memory) -> None:
        with current(self.device):
            check_capture(self.settings.engine.capture, self.checkpoint.config, self.device, self.dtype)
            check_fits(memory, self.device)
            self._load()
        give_back_freed()

    def _load(self) -> None:
        raise NotImplementedError

    def _context_tower(self) -> ContextTower:
        return load_context_tower(reported(self.checkpoint, ContextTower), self.device, self.dtype)

    def _denoiser_tower(self) -> DenoiserTower:
        return load_denoiser_tower(reported(self.checkpoint, DenoiserTower), self.device, self.dtype)

    async def open_line(self) -> Address:
        """Listen for the cell's requests; returns at once with the address to connect to."""
        return await TowerLine(self.runner, self.settings.engine.link_timeout_s).open()

    async def stats(self) -> list[EngineStats]:
        return await self.runner.stats()

    def _hooks(self) -> EngineHooks:
        return EngineHooks(self.runner.progress, self.runner.wake)


class ContextProcess(TowerProcess):
    """Hosts the context tower; opens a port for each denoiser, one at a time for each link."""

    def _load(self) -> None:
        tower = self._context_tower()
        compiling = Compiling(grammars_of(self.checkpoint.directory, tower.config), self.runner.wake)
        self._engine = ContextEngine(tower, self.settings.engine, self.runner.emit, compiling)
        self._engine.prepare()
        self._ports: dict[int, DistributedPort] = {}
        self.runner.start([self._engine], self.device)

    async def open_link(self, link: int, epoch: int) -> LinkAddress:
        """Listen for one denoiser; returns the address to connect to, once the sequences of the link's last denoiser
        are released.
        """
        await self.forget_link(link)
        cache = self._engine.cache
        told = fitted(self.settings.link_settings, cache, self.settings.engine.longest_delta)
        port, address = open_port(cache, link, epoch, told, self._hooks())
        self._ports[link] = port
        self._engine.connect(port)
        self.runner.wake()
        return address

    async def forget_link(self, link: int) -> None:
        """Returns once all sequences of the link's denoiser are released. A second caller waits, too."""
        port = self._ports.get(link)
        if port is not None:
            await asyncio.to_thread(self._forget, port)
            self._ports.pop(link, None)

    def _forget(self, port: DistributedPort) -> None:
        port.close()
        while self._engine.serves(port):
            self.runner.check()
            self.runner.wake()
            time.sleep(_SOON_S)


class DenoiserProcess(TowerProcess):
    """Hosts the denoiser tower and its mirror; decodes nothing before it is connected."""

    number = 1
    _link: DistributedLink | None = None

    def _load(self) -> None:
        """Makes the passes over the mirror, too: once the link is connected, the context side watches this engine's
        progress.
        """
        engine, tower = self.settings.engine, self._denoiser_tower()
        pages = engine.pages_of(page_tokens_on(self.device.type))
        self._mirror = TowerCache(tower.config, engine.max_sequences, pages, self.device, self.dtype)
        self._tower, self._passes = tower, prepared_passes(tower, self._mirror, engine)
        self._grammars = grammars_of(self.checkpoint.directory, tower.config)
        if self._grammars is not None:
            self._grammars.prepare()

    async def connect(self, address: LinkAddress) -> None:
        """Join the context tower's port and start decoding. Raises LinkDown."""
        await asyncio.to_thread(self._connect, address)

    async def let_go(self) -> bool:
        """Drop the link. Returns whether this process lacks only another link: its engine may have ended for a worse
        reason.
        """
        return await asyncio.to_thread(self._let_go)

    def _let_go(self) -> bool:
        if self._link is None:
            return True
        self._link.give_up("the cell joins its towers again")
        self.runner.wake()
        if not (self.runner.ended(_LET_GO_S) and isinstance(self.runner.error, LinkDown)):
            return False
        self._link, self.runner = None, EngineRunner(self.settings.engine.stall_timeout_s)
        return True

    def _connect(self, address: LinkAddress) -> None:
        engine = self.settings.engine
        with current(self.device):
            link = self._link = connect(address, self._mirror, self._hooks())
            compiling = Compiling(self._grammars, self.runner.wake)
            denoiser = DenoiserEngine(
                self._tower, link, engine, self.runner.emit, passes=self._passes, compiling=compiling
            )
        self.runner.start([denoiser], self.device)


class ColocatedProcess(TowerProcess):
    """Hosts both towers on one device (`colocated`), or the context tower alone (`ar_only`)."""

    def _load(self) -> None:
        context = self._context_tower()
        denoiser = None
        if self.settings.placement == "colocated":
            denoiser = self._denoiser_tower()
        where = self.checkpoint.directory
        self.runner = colocated_runner(context, denoiser, self.settings.engine, prepare=True, checkpoint=where)
