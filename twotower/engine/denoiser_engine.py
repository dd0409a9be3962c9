"""The denoiser tower's engine: steps sequences against the mirror, sends their commits through its link.

Owns the tower and the link. One thread calls it. A tick steps every row that is ready and never waits for the others:
while some blocks are being committed, other rows go on. A mode defines a step and its commits
(`twotower.engine.modes`).
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from twotower.core import AnyRequest, Event, FailureEvent, Mode, ReleasedEvent, Request, RequestId
from twotower.decoding.certain_prefix import CertainPrefix
from twotower.decoding.steering import Matcher
from twotower.engine.answer import Answer, no_way_on
from twotower.engine.capture import passes_for
from twotower.engine.context.compiling import Compiling
from twotower.engine.handle import EngineStats
from twotower.engine.held_up import HeldUp
from twotower.engine.meter import Meter, Pass
from twotower.engine.modes.auto import Auto, Weighed
from twotower.engine.modes.block_steps import StepTrace
from twotower.engine.modes.diffusion import Diffusion
from twotower.engine.modes.mock_ar import MockAr
from twotower.engine.modes.strategy import DenoiserMode, LedSequence, Turn
from twotower.engine.modes.unrated import Unrated
from twotower.engine.modes.verified import Verified
from twotower.engine.passes import USUAL_WIDTH, Passes
from twotower.engine.settings import EngineSettings
from twotower.engine.stepping import Stepping, usual_rows
from twotower.errors import LinkDown, NumericalError, TwoTowerError
from twotower.exchange.protocol import (
    Command,
    Commit,
    Delta,
    Failed,
    Link,
    LinkLost,
    Prefill,
    Rating,
    Release,
    Released,
)
from twotower.model.cache import TowerCache
from twotower.model.tower import DenoiserTower


def prepared_passes(tower: DenoiserTower, mirror: TowerCache, settings: EngineSettings) -> Passes:
    """The `passes` argument of `DenoiserEngine`, prepared for the usual passes: on a GPU many captures, which take a
    while.
    """
    passes = _passes(tower, mirror, settings)
    passes.prepare(USUAL_WIDTH)
    return passes


def _passes(tower: DenoiserTower, cache: TowerCache, settings: EngineSettings) -> Passes:
    return passes_for(tower, cache, settings.capture, settings.max_sequence_length)


class DenoiserEngine:
    """Decodes requests of the modes that a denoiser leads, many at a time."""

    def __init__(
        self,
        tower: DenoiserTower,
        link: Link,
        settings: EngineSettings,
        emit: Callable[[Event], None],
        trace: Callable[[StepTrace], None] | None = None,
        passes: Passes | None = None,
        compiling: Compiling | None = None,
    ) -> None:
        """`passes` over the link's cache, if they were made before the link. `compiling`: compiles the grammars of
        tokens that are decided here; without it none are served.
        """
        self.tower, self.link, self.settings = tower, link, settings
        self._passes = passes or _passes(tower, link.cache, settings)
        self._emit, self._compiling = emit, compiling or Compiling()
        # Modes in launch order: a mode that commits before its step must launch before the other modes step.
        self._modes: dict[Mode, DenoiserMode] = {
            Mode.MOCK_AR: MockAr(self._passes),
            Mode.DIFFUSION: Diffusion(self._passes, trace),
            Mode.VERIFIED: Verified(self._passes, trace),
        }
        self._meter = Meter()
        self._stepping = Stepping(self._modes, tower.device, self._meter, self._commit_first, self._fail)
        self._auto = Auto(self._meter, link.apart)
        self._sequences: dict[int, LedSequence] = {}
        self._numbers: dict[RequestId, int] = {}
        self._next_number = 0
        self._inbox: deque[Request | RequestId] = deque()
        self._commands: list[Command] = []
        self.ticks = self.rows = self.near_ties = 0
        self._waits = HeldUp()

    def stats(self, busy_s: float) -> EngineStats:
        room, waits, traffic = self.link.cache.room, self._waits, self.link.traffic
        return EngineStats(
            "denoiser", self.ticks, self.rows, busy_s, len(self._sequences),
            room.free_slots, room.free_pages, room.slots, room.pages, self.near_ties,
            waits.commit_s, waits.prompt_s, traffic.nbytes, traffic.payloads, traffic.seconds,
            out_of_memory=self._stepping.short.times,
        )  # fmt: skip

    def prepare(self) -> None:
        """Before the first request: make ready for the usual passes, and for grammars."""
        self._compiling.prepare()
        self._passes.prepare(USUAL_WIDTH)

    def takes(self, request: AnyRequest) -> bool:
        return request.needs_denoiser

    def add(self, request: AnyRequest) -> None:
        assert isinstance(request, Request), "scoring needs no denoiser"
        self._inbox.append(request)

    def cancel(self, request_id: RequestId) -> None:
        self._inbox.append(request_id)

    def close(self) -> None:
        self.link.close()

    def tick(self) -> bool:
        """Take what has arrived, step all ready rows, submit full blocks. False if nothing was ready."""
        self._take_inbox()
        self._auto.look(self._verified_rows())
        self._take_replies()
        ready = [s for s in self._sequences.values() if s.ready and not s.closing]
        self._waits.note(self._sequences.values(), bool(ready))
        for turns in self._stepping.step(ready):
            for sequence, turn in turns:
                self._take(sequence, turn)
        self._submit()
        if ready:
            self.ticks += 1
            self.rows += len(ready)
        return bool(ready)

    def _commit_first(self, sequences: list[LedSequence]) -> None:
        """Both towers read the same tokens at the same time."""
        for sequence in sequences:
            self._commit(sequence, sequence.tokens)
        self._submit(reading=True)

    def _take(self, sequence: LedSequence, turn: Turn) -> None:
        if not turn.finite:
            self._give_up(sequence, no_way_on(sequence.answer.steering) or _not_finite(sequence))
            return
        self.near_ties += sequence.answer.decided(turn.margin)
        if turn.trace is not None:
            self._emit(turn.trace)
        if turn.tokens:
            event = sequence.answer.extend(turn.tokens, turn.cost, turn.likelihoods)
            if sequence.unrated is not None:
                sequence.unrated.add(event, turn.confidence)
            else:
                self._emit(event)
            if sequence.mode is self._modes[Mode.DIFFUSION]:
                uncommitted = event.is_last and sequence.unrated is None
                self._auto.diffused(sequence.request.params, event.num_steps, len(event.token_ids), uncommitted)
            if event.is_last:
                self._end(sequence)
                return
        fault = no_way_on(sequence.certain)
        if turn.commit and (fault is None or sequence.unrated is not None):
            self._commit(sequence, turn.commit, turn.alone)
        if fault is not None:
            self._give_up(sequence, fault)

    def _give_up(self, sequence: LedSequence, error: TwoTowerError) -> None:
        """The request cannot continue. Tokens that are being read for their likelihoods are emitted first."""
        if sequence.unrated is not None and sequence.unrated.waits:
            sequence.unrated.error = error
        else:
            self._fail(sequence, error)

    def _end(self, sequence: LedSequence) -> None:
        """The answer is complete. With likelihoods, its last tokens are still read, once they can be."""
        last_words = sequence.unrated.last_words if sequence.unrated is not None else ()
        if not last_words:
            self._release(sequence)
        elif sequence.ready:
            self._commit(sequence, last_words)

    def _commit(self, sequence: LedSequence, tokens: Sequence[int], alone: int = 0) -> None:
        """The commit goes with the next message; until its delta arrives the sequence is not ready."""
        self._commands.append(Commit(sequence.number, sequence.length, tuple(tokens), alone))
        sequence.ready, sequence.alone = False, alone

    def _take_inbox(self) -> None:
        sequences: list[LedSequence] = []
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Request):
                sequences += self._begun(message)
                continue
            self._open(sequences)
            sequences = []
            self._cancel(message)
        self._open(sequences)
        self._compiling.take()

    def _cancel(self, request_id: RequestId) -> None:
        if request_id in self._compiling:
            self._compiling.drop(request_id)
            self._emit(ReleasedEvent(request_id))
        elif request_id in self._numbers:
            self._release(self._sequences[self._numbers[request_id]])

    def _begun(self, request: Request) -> list[LedSequence]:
        """The request's sequence; None while its grammar is still being compiled here."""
        params = request.params
        mode = self._modes[self._auto.begin(request) if params.mode is Mode.AUTO else params.mode]
        if params.structured_outputs is None or mode.verifying(request) is not None:
            return [self._sequence(request, mode)]
        go, fail = partial(self._go, request, mode), partial(self._refuse, request.id)
        self._compiling.begin(request.id, params.structured_outputs, go, fail)
        return []

    def _go(self, request: Request, mode: DenoiserMode, matcher: Matcher) -> None:
        """Raises InvalidRequest if no token may follow the text so far."""
        sequence = self._sequence(request, mode, matcher)
        fault = no_way_on(sequence.certain)
        if fault is not None:
            raise fault
        self._open([sequence])

    def _refuse(self, request_id: RequestId, error: TwoTowerError) -> None:
        self._emit(FailureEvent(request_id, error))
        self._emit(ReleasedEvent(request_id))

    def _open(self, sequences: Sequence[LedSequence]) -> None:
        """Open the sequences in one message. The link takes all or none of them: without room for all, each is opened
        on its own.
        """
        if not sequences:
            return
        try:
            self.link.submit([_prefill(sequence) for sequence in sequences])
        except TwoTowerError as error:
            if len(sequences) == 1:
                self._refuse(sequences[0].request.id, error)
                return
            for sequence in sequences:
                self._open([sequence])
            return
        for sequence in sequences:
            self._sequences[sequence.number] = sequence
            self._numbers[sequence.request.id] = sequence.number

    def _sequence(self, request: Request, mode: DenoiserMode, matcher: Matcher | None = None) -> LedSequence:
        """`matcher`: if its tokens are decided here under a grammar."""
        answer = Answer.begun(request, self.tower.config.eos_token_id, matcher)
        sequence = LedSequence(answer, self._next_number, mode)
        if request.params.mode is Mode.AUTO:
            sequence.drafting = Weighed(self._auto, request.params)
        if matcher is not None and answer.steering is None:
            sequence.certain = CertainPrefix(matcher, answer.stopping, request.committed)
        if request.logprobs is not None and sequence.mode.verifying(request) is None:
            sequence.unrated = Unrated(len(request.prompt_token_ids))
        sequence.mode.open(sequence)
        self._next_number += 1
        return sequence

    def _take_replies(self) -> None:
        for reply in self.link.poll():
            if isinstance(reply, LinkLost):
                self._lose_link(reply.reason)
            sequence = self._sequences.get(reply.sequence)
            if sequence is None:
                continue
            if isinstance(reply, Delta):
                self._has_grown(sequence, reply)
            elif isinstance(reply, Failed):
                self._fail(sequence, _named(sequence, reply.error))
            elif isinstance(reply, Released):
                self._forget(sequence)

    def _has_grown(self, sequence: LedSequence, delta: Delta) -> None:
        decided = delta.decided
        if decided is not None and decided.took is not None:
            kind = Pass.TOKEN if sequence.alone else Pass.READ
            self._meter.note(kind, decided.took.rows, decided.took.seconds)
        sequence.slot, sequence.length = delta.slot, delta.end
        sequence.ready = delta.complete
        sequence.answer.cached_tokens += delta.cached * (delta.end - delta.start)
        if sequence.closing:
            return
        self._take(sequence, sequence.mode.answered(sequence, delta))
        if sequence.unrated is not None:
            self._tell_rated(sequence, sequence.unrated, delta)

    def _tell_rated(self, sequence: LedSequence, unrated: Unrated, delta: Delta) -> None:
        event = unrated.rated(delta)
        if event is not None:
            self._emit(event)
            if event.is_last:
                self._release(sequence)
        if unrated.error is not None and not unrated.waits:
            self._fail(sequence, unrated.error)
        if unrated.last_words:
            self._end(sequence)

    def _verified_rows(self) -> int:
        """The rows of sequences whose tokens the context tower decides: they share passes."""
        mode = self._modes[Mode.VERIFIED]
        return sum(max(1, usual_rows(sequence)) for sequence in self._sequences.values() if sequence.mode is mode)

    def _forget(self, sequence: LedSequence) -> None:
        del self._sequences[sequence.number]
        del self._numbers[sequence.request.id]
        self._emit(ReleasedEvent(sequence.request.id))

    def _release(self, sequence: LedSequence) -> None:
        """Stop stepping; the slots are free when the context side has answered."""
        if not sequence.closing:
            sequence.closing = True
            self._commands.append(Release(sequence.number))

    def _submit(self, reading: bool = False) -> None:
        """Send all gathered commands as one message."""
        self.link.submit(self._commands, reading)
        self._commands = []

    def _fail(self, sequence: LedSequence, error: TwoTowerError) -> None:
        if not sequence.closing:
            self._emit(FailureEvent(sequence.request.id, error))
            self._release(sequence)

    def _lose_link(self, reason: str) -> NoReturn:
        """Without its link this engine can do nothing: tell every request, then end, so that the cell is replaced."""
        error = LinkDown(reason)
        for sequence in list(self._sequences.values()):
            if not sequence.closing:
                self._emit(FailureEvent(sequence.request.id, error))
            self._forget(sequence)
        raise error


def _prefill(sequence: LedSequence) -> Prefill:
    request, mode = sequence.request, sequence.mode
    rating = None if request.logprobs is None else Rating(request.logprobs, len(request.history))
    prompt, verifying = mode.prompt(request), mode.verifying(request)
    return Prefill(sequence.number, prompt, request.positions, verifying, rating, request.cache_salt)


def _named(sequence: LedSequence, error: TwoTowerError) -> TwoTowerError:
    """The context tower knows a sequence by its number, a person by its request."""
    if isinstance(error, NumericalError):
        return NumericalError(f"request {sequence.request.id}: {error}")
    return error


def _not_finite(sequence: LedSequence) -> NumericalError:
    return NumericalError(
        f"request {sequence.request.id}: the denoiser tower's logits hold a NaN or an infinity "
        f"(block {sequence.block}, step {sequence.step})"
    )
