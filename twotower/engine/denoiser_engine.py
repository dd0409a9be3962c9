"""The denoiser tower's engine: refines blocks against the mirror, commits full ones through its link.

Owns the tower and the link. One thread calls it; a tick steps every row that is ready and never waits for those that
are not: while some blocks are being committed, others go on.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from twotower.config import MASK_TOKEN_ID
from twotower.core import AnyRequest, BlockEvent, Event, FailureEvent, Mode, ReleasedEvent, Request, RequestId
from twotower.decoding.margins import NEAR_TIE
from twotower.decoding.randomness import step_key
from twotower.decoding.sampling import TokenParams, sample
from twotower.decoding.stopping import Stopping
from twotower.decoding.unmasking import Blocks, Decision, StepParams
from twotower.engine.capture import passes_for
from twotower.engine.handle import EngineStats
from twotower.engine.passes import MAX_POSITIONS, USUAL_WIDTH, Passes
from twotower.engine.settings import EngineSettings
from twotower.errors import LinkDown, NumericalError, TwoTowerError
from twotower.exchange.protocol import Command, Commit, Delta, Failed, Link, LinkLost, Prefill, Release, Released
from twotower.model.cache import TowerCache
from twotower.model.tower import DenoiserTower

_NARROW = 16


@dataclass(frozen=True, slots=True)
class StepTrace:
    """What one step saw and did, for whoever wants to watch: tokens before it and positions it fixed.

    `margin` is that of its closest decision (`twotower.decoding.margins`).
    """

    request_id: RequestId
    block: int
    step: int
    t: float
    tokens: tuple[int, ...]
    predicted: tuple[int, ...]
    confidence: tuple[float, ...]
    committed: tuple[int, ...]
    margin: float


@dataclass(slots=True)
class _Sequence:
    """A request being decoded here. `ready`: the mirror holds all that has been committed, so it can step."""

    request: Request
    number: int
    stopping: Stopping
    slot: int = -1
    ready: bool = False
    closing: bool = False
    length: int = 0
    tokens: list[int] = field(default_factory=list)
    masked: list[bool] = field(default_factory=list)
    step: int = 0
    block: int = 0
    generated: int = 0
    margin: float = 1.0

    def fresh_block(self) -> None:
        size = self.request.params.block_size
        self.tokens, self.masked, self.step = [MASK_TOKEN_ID] * size, [True] * size, 0


@dataclass(frozen=True, slots=True)
class _Step:
    """A forward that has been launched: what it decided, rows of numbers still on the device, and who takes them."""

    outcome: Tensor
    take: Callable[[list[list[float]]], None]


def prepared_passes(tower: DenoiserTower, mirror: TowerCache, settings: EngineSettings) -> Passes:
    """What `DenoiserEngine` takes as `passes`, ready for the usual ones: on a GPU many captures, which take a while."""
    passes = _passes(tower, mirror, settings)
    passes.prepare(USUAL_WIDTH)
    return passes


def _passes(tower: DenoiserTower, cache: TowerCache, settings: EngineSettings) -> Passes:
    return passes_for(tower, cache, settings.capture, settings.max_sequence_length)


class DenoiserEngine:
    """Decodes `diffusion` and `mock_ar` requests, many at a time, each row at its own step of its own block."""

    def __init__(
        self,
        tower: DenoiserTower,
        link: Link,
        settings: EngineSettings,
        emit: Callable[[Event], None],
        trace: Callable[[StepTrace], None] | None = None,
        passes: Passes | None = None,
    ) -> None:
        """`passes` over the link's cache, where they were made before the link."""
        self.tower, self.link, self.settings = tower, link, settings
        self._passes = passes or _passes(tower, link.cache, settings)
        self._emit, self._trace = emit, trace
        self._sequences: dict[int, _Sequence] = {}
        self._numbers: dict[RequestId, int] = {}
        self._next_number = 0
        self._inbox: deque[Request | RequestId] = deque()
        self._commands: list[Command] = []
        self.ticks = self.rows = self.near_ties = 0

    def stats(self, busy_s: float) -> EngineStats:
        cache, settings = self.link.cache, self.settings
        return EngineStats(
            "denoiser", self.ticks, self.rows, busy_s, len(self._sequences),
            cache.free_slots, cache.free_pages, settings.max_sequences, settings.pages, self.near_ties,
        )  # fmt: skip

    def prepare(self) -> None:
        """Before the first request: make ready for the usual passes."""
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
        """Take what has arrived, step all ready rows, submit what is full. False where nothing was ready."""
        self._take_inbox()
        self._take_replies()
        ready = [s for s in self._sequences.values() if s.ready and not s.closing]
        blocks = [s for s in ready if s.request.params.mode is Mode.DIFFUSION]
        tokens = [s for s in ready if s.request.params.mode is Mode.MOCK_AR]
        steps = [self._step_tokens(tokens)] if tokens else []
        steps += [self._step_blocks(batch) for batch in _of_like_width(blocks)]
        # The only time the host waits for the device, however many forwards there were.
        for step, outcome in zip(steps, _to_host([step.outcome for step in steps]), strict=True):
            step.take(outcome)
        self._submit()
        if ready:
            self.ticks += 1
            self.rows += len(ready)
        return bool(ready)

    def _take_inbox(self) -> None:
        requests: list[Request] = []
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Request):
                requests.append(message)
                continue
            self._open(requests)
            requests = []
            if message in self._numbers:
                self._release(self._sequences[self._numbers[message]])
        self._open(requests)

    def _open(self, requests: Sequence[Request]) -> None:
        """As one message. The link takes all or none of them: where there is no room for all, each on its own."""
        if not requests:
            return
        sequences = {self._next_number + i: request for i, request in enumerate(requests)}
        self._next_number += len(requests)
        try:
            self.link.submit([_prefill(*each) for each in sequences.items()])
        except TwoTowerError as error:
            if len(requests) > 1:
                for request in requests:
                    self._open([request])
                return
            self._emit(FailureEvent(requests[0].id, error))
            self._emit(ReleasedEvent(requests[0].id))
            return
        for number, request in sequences.items():
            sequence = _Sequence(request, number, Stopping(request.params, self.tower.config.eos_token_id))
            sequence.generated = len(request.committed)
            if request.params.mode is Mode.MOCK_AR:
                sequence.tokens = [request.history[-1]]
            else:
                sequence.block = len(request.committed) // request.params.block_size
                sequence.fresh_block()
            self._sequences[number] = sequence
            self._numbers[request.id] = number

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
                self._fail(sequence, reply.error)
            elif isinstance(reply, Released):
                self._forget(sequence)

    def _has_grown(self, sequence: _Sequence, delta: Delta) -> None:
        sequence.slot, sequence.length = delta.slot, delta.end
        sequence.ready = delta.complete

    def _forget(self, sequence: _Sequence) -> None:
        del self._sequences[sequence.number]
        del self._numbers[sequence.request.id]
        self._emit(ReleasedEvent(sequence.request.id))

    def _release(self, sequence: _Sequence) -> None:
        """Stop stepping; the slots are back when the context side has answered."""
        if not sequence.closing:
            sequence.closing = True
            self._commands.append(Release(sequence.number))

    def _submit(self, reading: bool = False) -> None:
        """All that has gathered, as one message."""
        self.link.submit(self._commands, reading)
        self._commands = []

    def _fail(self, sequence: _Sequence, error: TwoTowerError) -> None:
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

    def _step_blocks(self, sequences: list[_Sequence]) -> _Step:
        blocks = Blocks(
            [s.tokens for s in sequences], [s.masked for s in sequences], [_step_params(s) for s in sequences]
        )
        outcome = self._passes.step([s.slot for s in sequences], blocks)
        return _Step(outcome, partial(self._have_stepped, sequences, blocks))

    def _have_stepped(self, sequences: list[_Sequence], blocks: Blocks, outcome: list[list[float]]) -> None:
        for sequence, decision in zip(sequences, blocks.read(outcome), strict=True):
            if self._trace is not None:
                self._report(sequence, decision)
            if not decision.finite:
                self._fail(sequence, self._not_finite(sequence))
                continue
            self._has_decided(sequence, decision.margin)
            sequence.tokens = decision.tokens[: len(sequence.tokens)]
            # Padding is not masked and so cannot have been fixed.
            sequence.masked = [m and not now for m, now in zip(sequence.masked, decision.committed, strict=False)]
            sequence.step += 1
            if not any(sequence.masked):
                self._block_is_full(sequence)

    def _block_is_full(self, sequence: _Sequence) -> None:
        kept, reason = sequence.stopping.cut(sequence.tokens, sequence.generated)
        smallest = None if reason is None else sequence.margin
        self._emit(BlockEvent(sequence.request.id, sequence.generated, kept, sequence.step, 1, reason, smallest))
        sequence.generated += len(kept)
        if reason is None:
            self._commands.append(Commit(sequence.number, sequence.length, tuple(sequence.tokens)))
            sequence.block += 1
            sequence.ready = False
            sequence.fresh_block()
        else:
            self._release(sequence)

    def _step_tokens(self, sequences: list[_Sequence]) -> _Step:
        """Mock-AR: step on the newest token while the context tower reads it."""
        self._commands += [Commit(s.number, s.length, tuple(s.tokens)) for s in sequences]
        self._submit(reading=True)  # before the forward, so that both towers work at the same time
        logits_RV = self._passes.run([s.slot for s in sequences], [s.tokens for s in sequences])[:, 0]
        finite_R = torch.isfinite(logits_RV).all(1)
        sampled = sample(logits_RV, [TokenParams.of(s.request.params, s.generated) for s in sequences])
        outcome_R3 = torch.stack([sampled.tokens_R.float(), sampled.margin_R, finite_R.float()], dim=1)
        return _Step(outcome_R3, partial(self._have_tokens, sequences))

    def _have_tokens(self, sequences: list[_Sequence], outcome: list[list[float]]) -> None:
        for sequence, (token, margin, finite) in zip(sequences, outcome, strict=True):
            if not finite:
                self._fail(sequence, self._not_finite(sequence))
                continue
            self._has_decided(sequence, margin)
            self._has_token(sequence, int(token))

    def _has_decided(self, sequence: _Sequence, margin: float) -> None:
        self.near_ties += margin < NEAR_TIE
        sequence.margin = min(sequence.margin, margin)

    def _has_token(self, sequence: _Sequence, token: int) -> None:
        kept, reason = sequence.stopping.cut([token], sequence.generated)
        smallest = None if reason is None else sequence.margin
        self._emit(BlockEvent(sequence.request.id, sequence.generated, kept, 1, len(kept), reason, smallest))
        sequence.generated += 1
        if reason is None:
            sequence.tokens, sequence.ready = [token], False
        else:
            self._release(sequence)

    def _not_finite(self, sequence: _Sequence) -> NumericalError:
        return NumericalError(
            f"request {sequence.request.id}: the denoiser tower's logits hold a NaN or an infinity "
            f"(block {sequence.block}, step {sequence.step})"
        )

    def _report(self, sequence: _Sequence, decision: Decision) -> None:
        assert self._trace is not None
        size = len(sequence.tokens)
        self._trace(
            StepTrace(
                sequence.request.id,
                sequence.block,
                sequence.step,
                sum(sequence.masked) / size,
                tuple(sequence.tokens),
                tuple(decision.predicted[:size]),
                tuple(decision.confidence[:size]),
                tuple(place for place, now in enumerate(decision.committed) if now),
                decision.margin,
            )
        )


def _prefill(number: int, request: Request) -> Prefill:
    # Mock-AR steps on the last token itself, so its mirror stays one token behind.
    read = request.history[:-1] if request.params.mode is Mode.MOCK_AR else request.history
    return Prefill(number, read, request.positions)


def _to_host(outcomes: Sequence[Tensor]) -> list[list[list[float]]]:
    """All of them in one transfer."""
    if len(outcomes) <= 1:
        return [outcome.tolist() for outcome in outcomes]
    flat = torch.cat([outcome.flatten() for outcome in outcomes]).tolist()
    rows, end = [], 0
    for outcome in outcomes:
        start, width = end, outcome.shape[1]
        end += outcome.numel()
        rows.append([flat[i : i + width] for i in range(start, end, width)])
    return rows


def _step_params(sequence: _Sequence) -> StepParams:
    params = sequence.request.params
    key = step_key(params.seed, sequence.block, sequence.step) if params.samples else 0
    # With steps_per_block 1 (or on the last step) everything still masked is fixed.
    steps_left = max(params.steps_per_block - sequence.step, 1)
    return StepParams(params.confidence_threshold, steps_left, params.temperature, key)


def _of_like_width(sequences: Sequence[_Sequence]) -> list[list[_Sequence]]:
    """Batches for one forward each. Rows are padded to the widest, so a wide block must not widen everybody's.

    Blocks of up to `_NARROW` positions share one forward, wider ones those of the same power of two; no forward takes
    more than `MAX_POSITIONS`, so that its logits fit into memory whatever was asked for.
    """
    by_width: dict[int, list[_Sequence]] = {}
    for sequence in sequences:
        size = len(sequence.tokens)
        by_width.setdefault(_NARROW if size <= _NARROW else 1 << (size - 1).bit_length(), []).append(sequence)
    batches = []
    for width, group in by_width.items():
        rows = max(1, MAX_POSITIONS // width)
        batches += [group[first : first + rows] for first in range(0, len(group), rows)]
    return batches
