"""The context tower's engine: reads prompts and committed blocks for its denoisers, decodes `ar` requests and scores
itself.

Owns the tower and the cache. One thread calls it; `tick` runs at most one forward.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.core import (
    AnyRequest,
    BlockEvent,
    Event,
    FailureEvent,
    ReleasedEvent,
    Request,
    RequestId,
    ScoreRequest,
)
from twotower.decoding.margins import NEAR_TIE
from twotower.decoding.sampling import sample
from twotower.decoding.stopping import Stopping
from twotower.engine.capture import passes_for
from twotower.engine.context_sequence import ContextSequence
from twotower.engine.handle import EngineStats
from twotower.engine.passes import PROMPT_PARTS, SHORT_PROMPT, USUAL_WIDTH, EagerPasses, Want
from twotower.engine.scheduler import CommitBatch, ContextScheduler, DecodeBatch, Key, PrefillBatch, PrefillChunk
from twotower.engine.scores import ScoredRow, ScoreSheet, score_rows, to_host
from twotower.engine.settings import EngineSettings
from twotower.errors import InvalidRequest, NumericalError, TwoTowerError
from twotower.exchange.protocol import Attach, Command, Commit, Delta, Failed, Port, Prefill, Release, Released, Reply
from twotower.model.cache import TowerCache
from twotower.model.tower import ContextTower
from twotower.model.transfer import fence_on


@dataclass(slots=True)
class _Parts:
    """Chunks of prompts being read, and the pass that reads them, of which `left` parts are to come."""

    chunks: Sequence[PrefillChunk]
    passes: Iterator[Tensor]
    left: int = PROMPT_PARTS


class ContextEngine:
    """Serves any number of ports, its own `ar` requests, and scoring."""

    def __init__(self, tower: ContextTower, settings: EngineSettings, emit: Callable[[Event], None]) -> None:
        self.tower, self.settings, self._emit = tower, settings, emit
        self.cache = TowerCache(tower.config, settings.max_sequences, settings.pages, tower.device, tower.dtype)
        self._passes = passes_for(tower, self.cache, settings.capture, settings.max_sequence_length)
        self._eager = EagerPasses(tower, self.cache)
        self._ports: dict[int, Port] = {}
        self._next_port = 0
        # By request, or by link and number where a denoiser leads.
        self._sequences: dict[Key, ContextSequence] = {}
        self._scheduler = ContextScheduler(settings.prefill_chunk_tokens, self._waited_for)
        self._replies: dict[int, list[Reply]] = {}
        self._inbox: deque[AnyRequest | RequestId | Port] = deque()
        self._parts: _Parts | None = None
        self._last_part: torch.cuda.Event | None = None
        self.ticks = self.rows = self.near_ties = 0

    def stats(self, busy_s: float) -> EngineStats:
        cache, settings = self.cache, self.settings
        return EngineStats(
            "context", self.ticks, self.rows, busy_s, len(self._sequences),
            cache.free_slots, cache.free_pages, settings.max_sequences, settings.pages, self.near_ties,
        )  # fmt: skip

    def prepare(self) -> None:
        """Before the first request: make ready for the usual passes."""
        for width in (USUAL_WIDTH, 2 * USUAL_WIDTH):  # commits and the shortest prompts, then the usual prompts
            self._passes.prepare(width)

    def connect(self, port: Port) -> None:
        """Serve one more denoiser. From any thread."""
        self._inbox.append(port)

    def takes(self, request: AnyRequest) -> bool:
        return not request.needs_denoiser

    def add(self, request: AnyRequest) -> None:
        """Decode an `ar` request, or score. From any thread."""
        self._inbox.append(request)

    def cancel(self, request_id: RequestId) -> None:
        self._inbox.append(request_id)

    def close(self) -> None:
        """End every link."""
        for port in self._ports.values():
            port.close()

    def tick(self) -> bool:
        """Take what has arrived, run one forward, send what came of it. False where there was nothing to do."""
        if self._last_part is not None:
            # On a GPU the host would queue chunk after chunk, and a commit that comes meanwhile behind them all.
            self._last_part.synchronize()
            self._last_part = None
        self._take_inbox()
        for index in list(self._ports):
            self._take_commands(index)
        work = self._scheduler.next()
        if isinstance(work, CommitBatch):
            self._commit([self._sequences[key] for key in work.keys])
        elif isinstance(work, DecodeBatch):
            self._decode([self._sequences[key] for key in work.keys])
        elif isinstance(work, PrefillBatch):
            self._prefill(work.chunks)
        for index, replies in self._replies.items():
            if index in self._ports:
                self._ports[index].send(replies)
        self._replies.clear()
        if work is not None:
            self.ticks += 1
        return work is not None

    def _take_inbox(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Request | ScoreRequest):
                self._open_own(message)
            elif not isinstance(message, str):
                self._ports[self._next_port] = message
                self._next_port += 1
            elif message in self._sequences:
                self._end_parts_of(message)
                if message in self._sequences:  # it may have ended with its last part
                    self._close_own(message)

    def _open_own(self, request: AnyRequest) -> None:
        try:
            slot = self.cache.allocate(request.positions)
        except TwoTowerError as error:
            self._emit(FailureEvent(request.id, error))
            self._emit(ReleasedEvent(request.id))
            return
        if isinstance(request, ScoreRequest):
            sequence = ContextSequence(slot, list(request.token_ids[:-1]), sheet=ScoreSheet(request))
        else:
            stopping = Stopping(request.params, self.tower.config.eos_token_id)
            sequence = ContextSequence(slot, list(request.history), request=request, stopping=stopping)
            sequence.generated = len(request.committed)
        self._sequences[request.id] = sequence
        self._scheduler.add_prompt(request.id, 0, len(sequence.to_read))

    def _close_own(self, request_id: RequestId) -> None:
        self._forget(request_id)
        self._emit(ReleasedEvent(request_id))

    def _fail_own(self, request_id: RequestId, error: TwoTowerError) -> None:
        self._emit(FailureEvent(request_id, error))
        self._close_own(request_id)

    def _forget(self, key: Key) -> None:
        self._end_parts_of(key)
        sequence = self._sequences.pop(key)
        self._scheduler.drop(key)
        self.cache.free(sequence.slot)

    def _take_commands(self, index: int) -> None:
        port = self._ports[index]
        for command in port.receive():
            try:
                self._take(index, command)
            except TwoTowerError as error:
                self._reply(index, Failed(command.sequence, error))
        if port.lost is not None:
            for key in [key for key in self._sequences if isinstance(key, tuple) and key[0] == index]:
                self._forget(key)
            threading.Thread(target=port.close, name="closing a lost port", daemon=True).start()
            del self._ports[index]

    def _take(self, index: int, command: Command) -> None:
        key = (index, command.sequence)
        if isinstance(command, Prefill):
            self._open(key, command.reserve, command.token_ids)
        elif isinstance(command, Attach):
            self._attach(key, command)
        elif isinstance(command, Commit):
            self._queue_commit(key, command)
        elif isinstance(command, Release):
            if key in self._sequences:
                self._forget(key)
            self._reply(index, Released(command.sequence))

    def _open(self, key: tuple[int, int], reserve: int, token_ids: Sequence[int]) -> ContextSequence:
        if key in self._sequences:
            raise InvalidRequest.of("sequence", f"got {key[1]}, which is already open on this link")
        sequence = ContextSequence(self.cache.allocate(reserve), list(token_ids), link=key[0], number=key[1])
        self._sequences[key] = sequence
        if token_ids:
            self._scheduler.add_prompt(key, 0, len(token_ids))
        else:
            self._reply(key[0], Delta(key[1], 0, 0, sequence.slot))
        return sequence

    def _attach(self, key: tuple[int, int], command: Attach) -> None:
        """Bring both sides to the longer of two histories, then send the whole cache."""
        sequence = self._sequences.get(key)
        if sequence is None:
            self._open(key, command.reserve, command.token_ids).attach_known = len(command.token_ids)
            return
        if sequence.to_read:
            raise InvalidRequest.of("sequence", f"got an attach to {command.sequence} while it is being read")
        known, told = sequence.read, list(command.token_ids)
        shared = min(len(known), len(told))
        if known[:shared] != told[:shared]:
            place = next(i for i in range(shared) if known[i] != told[i])
            raise InvalidRequest.of(
                "token_ids", f"got {told[place]} at position {place}, but the context tower has read {known[place]}"
            )
        sequence.attach_known = len(told)
        sequence.to_read = told[shared:]
        if sequence.to_read:
            self._scheduler.add_commit(key, len(sequence.to_read))
        else:
            self._tell(sequence, 0, complete=True)

    def _queue_commit(self, key: tuple[int, int], command: Commit) -> None:
        sequence = self._sequences.get(key)
        if sequence is None:
            raise InvalidRequest.of("sequence", f"got a commit to {command.sequence}, which is not open on this link")
        expected = len(sequence.read) + len(sequence.to_read)
        if command.start != expected:
            raise InvalidRequest.of("start", f"got a commit at position {command.start}, wanted {expected}")
        if sequence.to_read:
            raise InvalidRequest.of("sequence", f"got a second commit to {command.sequence} before the first was read")
        sequence.to_read = list(command.token_ids)
        self._scheduler.add_commit(key, len(sequence.to_read))

    def _waited_for(self, keys: Sequence[Key]) -> bool:
        """Whether the denoisers that gave these blocks, beside this tower, can step nothing until they are read."""
        links = {self._sequences[key].link for key in keys}
        led = (sequence for sequence in self._sequences.values() if sequence.link in links)
        # A mock-AR token is read while its denoiser steps on it.
        return all(self._ports[link].apart for link in links) and all(len(each.to_read) > 1 for each in led)

    def _commit(self, sequences: list[ContextSequence]) -> None:
        self._read(sequences, [sequence.to_read for sequence in sequences], Want.STATES)
        for sequence in sequences:
            start = len(sequence.read)
            sequence.has_read(len(sequence.to_read))
            self._tell(sequence, start, complete=True)

    def _prefill(self, chunks: Sequence[PrefillChunk]) -> None:
        """Read these chunks; long ones in parts, a part each time they are asked for, so that rows which step meanwhile
        wait for one part only."""
        if self._parts is None:
            sequences = [self._sequences[chunk.key] for chunk in chunks]
            slots = [sequence.slot for sequence in sequences]
            tokens = [s.to_read[: c.end - c.start] for s, c in zip(sequences, chunks, strict=True)]
            want = Want.HIDDEN if any(map(self._decodes_from, chunks)) else Want.STATES
            if max(map(len, tokens)) <= SHORT_PROMPT:
                self._has_prefilled(chunks, self._passes.run(slots, tokens, want=want))
                self._last_part = fence_on(self.tower.device)
                return
            self._parts = _Parts(chunks, self._eager.parts(slots, tokens, PROMPT_PARTS, want))
        hidden_RLD = next(self._parts.passes)
        self._parts.left -= 1
        self._last_part = fence_on(self.tower.device)
        if not self._parts.left:
            self._parts = None
            self._has_prefilled(chunks, hidden_RLD)

    def _decodes_from(self, chunk: PrefillChunk) -> bool:
        """Whether something follows here from what this chunk gives: scores, or an `ar` answer's first token."""
        sequence = self._sequences[chunk.key]
        ends = chunk.end - chunk.start == len(sequence.to_read)
        return sequence.sheet is not None or (sequence.request is not None and ends)

    def _end_parts_of(self, key: Key) -> None:
        """A pass under way writes to this sequence's slot: it ends before the slot may be another's."""
        while self._parts is not None and any(chunk.key == key for chunk in self._parts.chunks):
            self._prefill(self._parts.chunks)

    def _has_prefilled(self, chunks: Sequence[PrefillChunk], hidden_RLD: Tensor) -> None:
        self._scheduler.has_read()
        sequences = [self._sequences[chunk.key] for chunk in chunks]
        self._extended(sequences, [chunk.end - chunk.start for chunk in chunks])
        finished: list[tuple[ContextSequence, Tensor]] = []
        scored: list[ScoredRow] = []
        for row, (sequence, chunk) in enumerate(zip(sequences, chunks, strict=True)):
            sequence.has_read(chunk.end - chunk.start)
            if sequence.sheet is not None:
                scored.append(ScoredRow.of(row, sequence.sheet, chunk))
            elif sequence.request is None:
                self._tell(sequence, chunk.start, complete=not sequence.to_read)
            elif not sequence.to_read:
                finished.append((sequence, hidden_RLD[row, chunk.end - chunk.start - 1]))
        # Queued on the device before anything is read from it.
        scores_PX = score_rows(self.tower, hidden_RLD, scored) if any(row.positions for row in scored) else None
        if finished:
            logits_RV = self.tower.logits(torch.stack([last for _, last in finished]))
            self._next_tokens([sequence for sequence, _ in finished], logits_RV)
        if scores_PX is not None:
            self._take_scores(scored, scores_PX)

    def _take_scores(self, rows: Sequence[ScoredRow], scores_PX: Tensor) -> None:
        for row, scores in zip(rows, to_host(scores_PX, rows), strict=True):
            request_id = row.sheet.request.id
            if not all(token.finite for token in scores):
                self._fail_own(request_id, _not_finite(request_id))
                continue
            row.sheet.add(scores)
            self.near_ties += sum(token.margin < NEAR_TIE for token in scores)
            if not self._sequences[request_id].to_read:
                self._emit(row.sheet.event())
                self._close_own(request_id)

    def _tell(self, sequence: ContextSequence, start: int, complete: bool) -> None:
        delta = sequence.delta(start, complete)
        if delta is not None:
            self._reply(sequence.link, delta)

    def _decode(self, sequences: list[ContextSequence]) -> None:
        tokens = [[sequence.to_read[0]] for sequence in sequences]
        logits_RLV = self._read(sequences, tokens, Want.LOGITS)
        for sequence in sequences:
            sequence.has_read(1)
        self._next_tokens(sequences, logits_RLV[:, 0])

    def _read(self, sequences: Sequence[ContextSequence], tokens: Sequence[Sequence[int]], want: Want) -> Tensor:
        """One causal forward that extends each sequence by its tokens. Returns what `Passes.run` does."""
        out = self._passes.run([sequence.slot for sequence in sequences], tokens, want=want)
        self._extended(sequences, list(map(len, tokens)))
        return out

    def _extended(self, sequences: Sequence[ContextSequence], lengths: Sequence[int]) -> None:
        for sequence, length in zip(sequences, lengths, strict=True):
            self.cache.advance(sequence.slot, length)
        self.rows += len(sequences)

    def _next_tokens(self, sequences: list[ContextSequence], logits_RV: Tensor) -> None:
        finite_R = torch.isfinite(logits_RV).all(1)
        sampled = sample(logits_RV, [sequence.params for sequence in sequences])
        # The host waits for the device here and in `_take_scores` only.
        outcome_R3 = torch.stack([sampled.tokens_R.float(), sampled.margin_R, finite_R.float()], dim=1)
        for sequence, (token, margin, finite) in zip(sequences, outcome_R3.tolist(), strict=True):
            self._emit_token(sequence, int(token), bool(finite), margin)

    def _emit_token(self, sequence: ContextSequence, token: int, finite: bool, margin: float) -> None:
        request = sequence.request
        assert request is not None and sequence.stopping is not None
        if not finite:
            self._fail_own(request.id, _not_finite(request.id))
            return
        self.near_ties += margin < NEAR_TIE
        sequence.margin = min(sequence.margin, margin)
        kept, reason = sequence.stopping.cut([token], sequence.generated)
        smallest = None if reason is None else sequence.margin
        self._emit(BlockEvent(request.id, sequence.generated, kept, 0, len(kept), reason, smallest))
        sequence.generated += 1
        if reason is not None:
            self._close_own(request.id)
            return
        sequence.to_read = [token]
        self._scheduler.add_decoding(request.id)

    def _reply(self, index: int, reply: Reply) -> None:
        self._replies.setdefault(index, []).append(reply)


def _not_finite(request_id: RequestId) -> NumericalError:
    return NumericalError(f"request {request_id}: the context tower's logits hold a NaN or an infinity")
