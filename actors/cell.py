"""A cell: starts, joins, tests and watches the tower processes of one pair, and replaces lost ones."""

import asyncio
import logging
import time
from collections.abc import Sequence

from ray.util.placement_group import PlacementGroup

from actors.cell_towers import CellTowers
from actors.settings import CellSettings, check_settings
from twotower.core import AnyRequest, Mode
from twotower.device_names import parse_device
from twotower.engine.expectation import Expectation
from twotower.engine.handle import EngineStats
from twotower.engine.ledger import Ledger
from twotower.engine.pair import Pair
from twotower.engine.self_test import self_test
from twotower.errors import TwoTowerError, Unavailable
from twotower.model.checkpoint import Checkpoint
from twotower.model.pages import page_tokens_on
from twotower.model.room import Room

logger = logging.getLogger(__name__)

_SETTLE_S = 0.2  # when the context tower dies, its denoisers may report first that they have lost their links
_PAUSE_S = 1.0


class RunningPair:
    """A pair whose towers run in processes of their own.

    A lost denoiser is replaced and tested while the context tower and other denoisers keep serving. A lost context
    tower is replaced and joined to the living denoisers; then there is a new pair. If this does not succeed within
    `mend_timeout_s`, `failure` says so, and the cell has to be replaced.
    """

    def __init__(
        self,
        settings: CellSettings,
        towers: CellTowers,
        modes: Sequence[Mode],
        expected: Expectation | None,
        fingerprint: str,
        vocabulary: str,
    ) -> None:
        self.modes, self.fingerprint, self.vocabulary = tuple(modes), fingerprint, vocabulary
        self._settings, self._towers, self._expected = settings, towers, expected
        self._mending: asyncio.Task[None] | None = None
        self._broken_at = 0.0
        self._given_up: str | None = None
        self._closed = False
        self.mended = 0
        self.pair: Pair

    @property
    def homes(self) -> list[dict[str, str]]:
        """The home of each tower process."""
        return self._towers.homes

    @property
    def mending_s(self) -> float:
        """How long it has been replacing a lost tower; 0 while it is whole."""
        mends = self._mending is not None and not self._mending.done()
        return time.monotonic() - self._broken_at if mends else 0.0

    async def open(self) -> None:
        """Make a pair of joined towers and test it. Raises a TwoTowerError; then the pair is closed."""
        towers, settings = self._towers, self._settings
        pair = Pair(towers.context, towers.denoisers, _ledger(settings), self._on_loss)
        pair.start()
        try:
            await self_test(pair, self.modes, settings.engine.start_timeout_s, self._expected)
        except BaseException:
            await pair.close()
            raise
        self.pair = pair

    def failure(self) -> str | None:
        """Why this cell has to be replaced, for a health check."""
        return self._given_up

    def why_not(self, request: AnyRequest) -> str | None:
        """Why a request of this kind is not served now."""
        error = self.pair.why_not(request)
        return None if error is None else str(error)

    def served(self) -> tuple[Mode, ...]:
        """The modes that are served now. A cell with `ar` serves scores."""
        return tuple(mode for mode in self.modes if self.pair.serves(mode))

    async def stats(self) -> list[EngineStats]:
        """Counters of every tower that answers."""
        per_process = await asyncio.gather(*(engine.stats() for engine in self._towers.engines), return_exceptions=True)
        return [stats for process in per_process if not isinstance(process, BaseException) for stats in process]

    async def close(self) -> None:
        """Fail running requests and end the tower processes."""
        self._closed = True
        if self._mending is not None:
            self._mending.cancel()
            await asyncio.gather(self._mending, return_exceptions=True)
        await self.pair.close()
        self._towers.kill()

    def _on_loss(self, denoiser: int | None) -> None:
        if not self._closed and (self._mending is None or self._mending.done()):
            self._broken_at = time.monotonic()
            self._mending = asyncio.create_task(self._mend())

    async def _mend(self) -> None:
        patience, why = self._settings.engine.mend_timeout_s, ""
        try:
            async with asyncio.timeout(patience):
                await asyncio.sleep(_SETTLE_S)
                while self._is_broken():
                    try:
                        await self._mend_once()
                        self.mended += 1
                    except TwoTowerError as error:
                        why = str(error)
                        logger.error("the cell is not whole yet: %s", why)
                        await asyncio.sleep(_PAUSE_S)
            logger.info("the cell is whole again")
        except TimeoutError:
            self._given_up = f"not mended within {patience:g} s: {why or 'a tower process does not start'}"
            logger.error("%s", self._given_up)
        except Exception as error:
            logger.exception("mending failed")
            self._given_up = f"it could not be mended ({type(error).__name__})"

    def _is_broken(self) -> bool:
        return self.pair.failure is not None or bool(self.pair.lost)

    async def _mend_once(self) -> None:
        """Replace the lost towers. Raises a TwoTowerError."""
        if self.pair.failure is None:
            if await self._towers.context_answers():
                await self._replace_denoiser(min(self.pair.lost))
                return
            self.pair.lose(None, Unavailable("the context tower does not answer"))
        logger.warning("the context tower is lost: starting another")
        await self.pair.close()
        await self._towers.start_again()
        await self.open()

    async def _replace_denoiser(self, index: int) -> None:
        logger.warning("denoiser %d is lost: starting another", index)
        await self._towers.part(index)
        self.pair.regain(index)  # modes without a denoiser have the room while weights are read
        trial = self.pair.replace(index, await self._towers.renew(index))
        try:
            led = [mode for mode in self.modes if mode is not Mode.AR]
            await self_test(trial, led, self._settings.engine.start_timeout_s, self._expected)
        except TwoTowerError as error:
            self.pair.lose(index, error)
            raise
        self.pair.accept(index)


async def start_pair(settings: CellSettings, group: PlacementGroup) -> RunningPair:
    """Start a cell's towers in bundles 1… of its placement group, join them, and try them out.

    Raises a TwoTowerError that says what is wrong; then no process is left behind.
    """
    modes = check_settings(settings)
    checkpoint = Checkpoint.open(settings.checkpoint, settings.engine.expert_format)
    expected = Expectation.load(settings.checkpoint)
    if expected is not None and checkpoint.quantises:
        logger.warning("self-test: experts are quantised here, so the checkpoint's own sample is left out")
        expected = None
    towers = CellTowers(settings, group)
    try:
        await towers.start()
        running = RunningPair(settings, towers, modes, expected, checkpoint.fingerprint, checkpoint.vocabulary)
        await running.open()
        return running
    except BaseException:
        towers.kill()
        raise


def _ledger(settings: CellSettings) -> Ledger:
    engine = settings.engine
    mirrors = settings.denoisers_per_context if settings.placement == "split" else 0
    page_tokens = page_tokens_on(parse_device(settings.device).kind)
    pages, stride = engine.pages_of(page_tokens), engine.prefix_stride_of(page_tokens)
    rooms = [Room(engine.max_sequences, pages, page_tokens=page_tokens) for _ in range(1 + mirrors)]
    return Ledger(rooms[0], rooms[1:], engine.max_queued_requests, stride=stride)
