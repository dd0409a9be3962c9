"""An observer that turns a router's runs into metrics."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.runs.allowances import LimitReached
from cluster.runs.answer import NOTHING, Usage
from cluster.runs.observers import Observer
from cluster.runs.record import Gap, Record
from cluster.watch import router_metrics as metrics
from cluster.watch.tally import Tally
from cluster.watch.words import code_of_end, mode_of
from twotower.core import AnswerEvent, BlockEvent, FinishReason, Mode, Request, RequestId, ScoreRequest
from twotower.errors import TwoTowerError


@dataclass(slots=True)
class _Watched:
    """A run that has not ended. `counted`: the counted part of its usage; `lost_at`: since when it has no cell."""

    record: Record
    mode: str
    opened: float
    first: float = 0.0
    first_tokens: int = 0
    last: float | None = None
    placed: bool = False
    lost_at: float | None = None
    counted: Usage = NOTHING


class RunMetrics(Observer):
    """Times are observed as events arrive. Tokens are counted once a second and at a run's end, from its usage. So they
    equal the clients' usage, also with stop strings and resumes.
    """

    def __init__(self, tally: Tally, clock: Callable[[], float] = time.monotonic) -> None:
        self._tally, self._clock = tally, clock
        self._open: dict[RequestId, _Watched] = {}

    def refused(self, error: TwoTowerError) -> None:
        if isinstance(error, LimitReached):
            self._tally.add(metrics.KEY_LIMITS, 1, error.key, error.limit)
        else:
            self._tally.add(metrics.REFUSED, 1, code_of_end(error).name)

    def opened(self, record: Record) -> None:
        self._open[record.request.id] = _Watched(record, mode_of(record), self._clock())

    def placed(self, record: Record) -> None:
        run = self._open[record.request.id]
        if not run.placed:
            run.placed = True
            self._tally.observe(metrics.QUEUE_TIME, self._clock() - run.opened, run.mode)

    def first_event(self, record: Record, event: AnswerEvent) -> None:
        run = self._open[record.request.id]
        run.first = self._clock()
        run.first_tokens = len(event.token_ids) if isinstance(event, BlockEvent) else 0
        self._tally.observe(metrics.FIRST_TOKEN, run.first - run.opened, run.mode)
        self._tally.add(metrics.PROMPT_TOKENS, _prompt_tokens(record), run.mode)

    def event(self, record: Record, event: AnswerEvent) -> None:
        run, now = self._open[record.request.id], self._clock()
        if run.last is not None:
            self._tally.observe(metrics.BETWEEN_BLOCKS, now - run.last, run.mode)
        if run.lost_at is not None:
            self._tally.observe(metrics.PAUSE, now - run.lost_at, run.mode)
            run.lost_at = None
        if run.mode == Mode.DIFFUSION and isinstance(event, BlockEvent) and event.num_blocks:
            self._tally.observe(metrics.BLOCK_STEPS, event.num_steps / event.num_blocks)
        run.last = now

    def handed_over(self, record: Record) -> None:
        self._moved(self._open[record.request.id], "handed_over")

    def resumed(self, record: Record, error: TwoTowerError) -> None:
        run = self._open[record.request.id]
        run.lost_at = run.lost_at or self._clock()
        self._moved(run, "gap" if isinstance(error, Gap) else "cell_lost")

    def ended(self, record: Record, error: BaseException | None) -> None:
        run = self._open.pop(record.request.id)
        self._count(run)
        if error is not None:
            self._tally.add(metrics.FAILURE, 1, run.mode, code_of_end(error).name)
            return
        reason = record.finish_reason or FinishReason.STOP  # a score ends with its event
        self._tally.add(metrics.SUCCESS, 1, run.mode, str(reason))
        self._tally.observe(metrics.LATENCY, self._clock() - run.opened, run.mode)
        following = record.usage.completion_tokens - run.first_tokens
        if run.last is not None and following > 0:
            self._tally.observe(metrics.TOKEN_TIME, (run.last - run.first) / following, run.mode)

    def read(self) -> None:
        """Count the new tokens of open runs."""
        for run in self._open.values():
            self._count(run)

    def _moved(self, run: _Watched, reason: str) -> None:
        self._tally.add(metrics.MOVES, 1, run.mode, reason)
        if run.record.usage.num_blocks:
            self._tally.add(metrics.REPLAYED, run.record.usage.num_blocks, run.mode)

    def _count(self, run: _Watched) -> None:
        told, counted = run.record.usage, run.counted
        if told is counted:
            return
        run.counted = told
        tokens, steps = told.completion_tokens - counted.completion_tokens, told.num_steps - counted.num_steps
        self._tally.add(metrics.TOKENS, tokens, run.mode)
        self._tally.add(metrics.BLOCKS, told.num_blocks - counted.num_blocks, run.mode)
        if isinstance(run.record.request, Request) and run.mode == Mode.DIFFUSION:
            self._tally.add(metrics.STEPS, steps)
            self._tally.add(metrics.CANVAS, steps * run.record.request.params.block_size)
            self._tally.add(metrics.COMMITTED, tokens)
        if run.mode == Mode.AUTO:
            for way, blocks in _blocks_by_mode(told).items():
                self._tally.add(metrics.AUTO_BLOCKS, blocks - _blocks_by_mode(counted)[way], str(way))
        if run.mode == Mode.VERIFIED:
            self._tally.add(metrics.DRAFTS, told.num_blocks - counted.num_blocks)
            self._tally.add(metrics.DRAFTED, told.num_drafted - counted.num_drafted)
            self._tally.add(metrics.ACCEPTED, told.num_accepted - counted.num_accepted)
            self._tally.add(metrics.DRAFT_STEPS, steps)


def _blocks_by_mode(usage: Usage) -> dict[Mode, int]:
    """The committed blocks of each mode that `auto` chose."""
    ar, diffusion = usage.num_ar_blocks, usage.num_diffusion_blocks
    return {Mode.AR: ar, Mode.DIFFUSION: diffusion, Mode.VERIFIED: usage.num_blocks - ar - diffusion}


def _prompt_tokens(record: Record) -> int:
    request = record.request
    return len(request.token_ids if isinstance(request, ScoreRequest) else request.prompt_token_ids)
