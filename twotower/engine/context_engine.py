"""The context tower's engine: reads prompts and committed blocks for its denoisers, decodes `ar` requests and scores
itself.

Owns the tower and the cache. One thread calls it; `tick` runs at most one forward, and one for drafts. The objects in
`twotower.engine.context` do the reading and use its results.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from twotower.core import AnyRequest, Event, FailureEvent, ReleasedEvent, Request, RequestId, ScoreRequest
from twotower.engine.capture import passes_for
from twotower.engine.context.commits import Commits
from twotower.engine.context.compiling import Compiling
from twotower.engine.context.decoding import Decoding
from twotower.engine.context.prompts import Prompts
from twotower.engine.context.scoring import Scoring
from twotower.engine.context.sequences import Sequences
from twotower.engine.handle import EngineStats
from twotower.engine.passes import USUAL_WIDTH, EagerPasses
from twotower.engine.prefixes import Prefixes
from twotower.engine.scheduler import CommitBatch, ContextScheduler, DecodeBatch, Key, PrefillBatch
from twotower.engine.settings import EngineSettings, PrefixMemory
from twotower.engine.short_memory import ShortMemory
from twotower.errors import TwoTowerError
from twotower.exchange.protocol import Port
from twotower.model.cache import TowerCache, state_bytes
from twotower.model.pages import page_tokens_on
from twotower.model.tower import ContextTower

logger = logging.getLogger(__name__)


class ContextEngine:
    """Serves any number of ports, its own `ar` requests, and scoring."""

    def __init__(
        self,
        tower: ContextTower,
        settings: EngineSettings,
        emit: Callable[[Event], None],
        compiling: Compiling | None = None,
    ) -> None:
        """`compiling`: compiles grammars; without it none are served."""
        self.tower, self.settings, self._emit = tower, settings, emit
        page_tokens = page_tokens_on(tower.device.type)
        snapshots = settings.snapshots(state_bytes(tower.config, tower.dtype), page_tokens)
        pages, stride = settings.pages_of(page_tokens), settings.prefix_stride_of(page_tokens)
        if stride > max(settings.prefill_chunk_tokens, page_tokens):
            logger.warning(
                "a kept prefix ends at a multiple of %d positions, of prefill_chunk_tokens (%d) and of a page (%d): a "
                "prefill_chunk_tokens that divides pages, or is divided by them, keeps more",
                stride, settings.prefill_chunk_tokens, page_tokens,
            )  # fmt: skip
        self.cache = TowerCache(
            tower.config, settings.max_sequences, pages, tower.device, tower.dtype, snapshots, page_tokens,
            settings.prefix_cache_in == PrefixMemory.HOST,
        )  # fmt: skip
        self._passes = passes_for(tower, self.cache, settings.capture, settings.max_sequence_length)
        self._eager = EagerPasses(tower, self.cache)
        self._scheduler = ContextScheduler(settings.prefill_chunk_tokens, lambda keys: self._commits.waited_for(keys))
        chunk, self.prefixes = settings.prefill_chunk_tokens, Prefixes(self.cache, stride)
        self._sequences = Sequences(self.cache, self._passes, self._scheduler, self.prefixes, chunk)
        self._short = ShortMemory("context")
        self._prompts = Prompts(
            self._sequences, self._scheduler, self._passes, self._eager, tower.device, self._short, self._fail
        )
        self._decoding = Decoding(tower, self._sequences, emit)
        self._compiling = compiling or Compiling()
        self._commits = Commits(tower, self._sequences, self._prompts, self._decoding, self._compiling, self._short)
        self._scoring = Scoring(tower, self._sequences, emit)
        self._inbox: deque[AnyRequest | RequestId | Port] = deque()
        self.ticks = 0

    @property
    def rows(self) -> int:
        return self._sequences.rows

    @property
    def near_ties(self) -> int:
        return self._decoding.near_ties + self._scoring.near_ties

    def stats(self, busy_s: float) -> EngineStats:
        room, kept = self.cache.room, self.prefixes
        return EngineStats(
            "context", self.ticks, self.rows, busy_s, len(self._sequences),
            room.free_slots, room.free_pages, room.slots, room.pages, self.near_ties,
            prefix_lookups=kept.lookups, prefix_hits=kept.hits, prefix_positions=kept.positions_saved,
            prefix_evictions=kept.evictions, prefix_bytes=kept.nbytes,
            out_of_memory=self._short.times,
        )  # fmt: skip

    def prepare(self) -> None:
        """Before the first request: make ready for the usual passes, and for grammars."""
        self._compiling.prepare()
        for width in (USUAL_WIDTH, 2 * USUAL_WIDTH):  # commits and the shortest prompts, then the usual prompts
            self._passes.prepare(width)

    def connect(self, port: Port) -> None:
        """Serve one more denoiser. From any thread."""
        self._inbox.append(port)

    def serves(self, port: Port) -> bool:
        """Whether the engine still holds the port or its sequences. From any thread."""
        return port in list(self._inbox) or port in list(self._commits.ports.values())

    def takes(self, request: AnyRequest) -> bool:
        return not request.needs_denoiser

    def add(self, request: AnyRequest) -> None:
        """Decode an `ar` request, or score. From any thread."""
        self._inbox.append(request)

    def cancel(self, request_id: RequestId) -> None:
        self._inbox.append(request_id)

    def close(self) -> None:
        """End every link."""
        for port in self._commits.ports.values():
            port.close()

    def tick(self) -> bool:
        """Take what has arrived, run one forward, send the results. False if there was nothing to do."""
        self._prompts.wait()
        self._take_inbox()
        self._commits.receive()
        self._compiling.take()
        self._sequences.begin()
        work = self._scheduler.next()
        if isinstance(work, CommitBatch):
            self._commits.read(work.keys)
        elif isinstance(work, DecodeBatch):
            self._decode(work.keys)
        elif isinstance(work, PrefillBatch):
            self._prompts.read(work.chunks)
        self._commits.send()
        self.ticks += work is not None
        return work is not None

    def _decode(self, keys: Sequence[Key]) -> None:
        short = self._short.tried(len(keys), partial(self._decoding.read, keys))
        if short is not None:
            for key in keys:
                self._fail(key, short)

    def _fail(self, key: Key, error: TwoTowerError) -> None:
        """A pass that was to extend its states broke off."""
        if key not in self._sequences:  # it ended before that, in the same turn
            return
        for own in (self._decoding, self._scoring):
            if isinstance(key, str) and key in own:
                self._emit(FailureEvent(RequestId(key), error))
                own.end(key)
                return
        self._commits.fail(key, error)

    def _take_inbox(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Request | ScoreRequest):
                self._open(message)
            elif isinstance(message, str):
                self._cancel(message)
            else:
                self._commits.connect(message)

    def _open(self, request: AnyRequest) -> None:
        try:
            if isinstance(request, ScoreRequest):
                self._scoring.open(request)
            elif request.params.structured_outputs is not None:
                go, fail = partial(self._decoding.open, request), partial(self._refuse, request.id)
                self._compiling.begin(request.id, request.params.structured_outputs, go, fail)
            else:
                self._decoding.open(request)
        except TwoTowerError as error:
            self._refuse(request.id, error)

    def _refuse(self, request_id: RequestId, error: TwoTowerError) -> None:
        self._emit(FailureEvent(request_id, error))
        self._emit(ReleasedEvent(request_id))

    def _cancel(self, request_id: RequestId) -> None:
        if request_id in self._compiling:
            self._compiling.drop(request_id)
            self._emit(ReleasedEvent(request_id))
        self._prompts.finish(request_id)
        for own in (self._decoding, self._scoring):
            if request_id in own:  # it may have ended with its last part
                own.end(request_id)
