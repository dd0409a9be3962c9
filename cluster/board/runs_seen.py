"""The operators' view of a router's requests: an observer of runs that keeps numbers and no text."""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.board.series import first_token_place
from cluster.runs.allowances import LimitReached
from cluster.runs.answer import NOTHING, Usage
from cluster.runs.callers import KeyRefused
from cluster.runs.observers import Observer
from cluster.runs.record import Record
from cluster.watch.words import code_of_end, mode_of
from twotower.core import AnswerEvent, BlockEvent, Mode, Request, RequestId, ScoreRequest
from twotower.errors import TwoTowerError

MOST_SHOWN = 40  # requests of a router
STRIP = 48  # blocks of a request whose steps are shown
_NO_FAULT = ("CANCELLED",)  # ends that are not failures: the client has left


@dataclass(frozen=True, slots=True)
class RunRow:
    """A running request. Times are ages in seconds. `steps_of`: the steps of its last blocks, in order.

    `id` is our own, drawn id. The client's label and address are left out, and so are prompt and answer.
    """

    id: str
    mode: str
    cell: str
    age_s: float
    quiet_s: float
    prompt_tokens: int
    tokens: int
    most_tokens: int
    blocks: int
    most_blocks: int
    steps: int
    most_steps: int
    steps_of: tuple[int, ...]
    moves: int


@dataclass(slots=True)
class _Open:
    """A run that has not ended. `last`: when it was last heard of."""

    record: Record
    mode: str
    opened: float
    last: float
    begun: bool = False
    moves: int = 0
    counted: Usage = NOTHING
    steps_of: deque[int] = field(default_factory=lambda: deque(maxlen=STRIP))


class RunsSeen(Observer):
    """Call `take` for the counts of a second. `note` is called with events for the time axis, by kind and text."""

    def __init__(
        self, note: Callable[[str, str], None] = lambda kind, text: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._note, self._clock = note, clock
        self._open: dict[RequestId, _Open] = {}  # in the order in which they began
        self._counts: Counter[str] = Counter()
        self._firsts: Counter[int] = Counter()

    def refused(self, error: TwoTowerError) -> None:
        """A refusal by a key's limit says nothing about the service; it has its own mark, by reason."""
        if isinstance(error, LimitReached):
            self._note("key", f"call refused: key {error.key} is at its {error.limit}")
            return
        if isinstance(error, KeyRefused):
            self._note("key", f"call refused: {error.reason}")
            return
        code = code_of_end(error).name
        if code not in _NO_FAULT:
            self._counts["refused"] += 1
        if code == "RESOURCE_EXHAUSTED":
            self._note("refused", f"call refused with {code}: no room")

    def opened(self, record: Record) -> None:
        now = self._clock()
        self._open[record.request.id] = _Open(record, mode_of(record), now, now)

    def placed(self, record: Record) -> None:
        self._open[record.request.id].last = self._clock()

    def first_event(self, record: Record, event: AnswerEvent) -> None:
        run = self._open[record.request.id]
        run.begun = True
        self._firsts[first_token_place(self._clock() - run.opened)] += 1

    def event(self, record: Record, event: AnswerEvent) -> None:
        run = self._open[record.request.id]
        run.last = self._clock()
        if run.mode == Mode.DIFFUSION and isinstance(event, BlockEvent) and event.num_blocks:
            run.steps_of.append(event.num_steps)

    def handed_over(self, record: Record) -> None:
        self._open[record.request.id].moves += 1
        self._note("moved", f"request handed over to cell {record.attempts[-1]}")

    def resumed(self, record: Record, error: TwoTowerError) -> None:
        self._open[record.request.id].moves += 1
        self._counts["resumed"] += 1
        self._note("moved", f"request resumed: cell {record.attempts[-1]} could not continue")

    def ended(self, record: Record, error: BaseException | None) -> None:
        run = self._open.pop(record.request.id)
        self._count(run)
        if error is None:
            self._counts["ended"] += 1
            return
        code = code_of_end(error).name
        if code not in _NO_FAULT:
            self._counts["failed"] += 1
            is_late = code == "DEADLINE_EXCEEDED"
            self._note(
                "late" if is_late else "failed",
                "request not done in time" if is_late else f"request failed with {code}",
            )

    @property
    def running(self) -> int:
        return len(self._open)

    def take(self) -> tuple[dict[str, float], dict[int, int]]:
        """The counts since the last call, by the series' name; and first tokens, by their bound's place."""
        for run in self._open.values():
            self._count(run)
        counts, self._counts = self._counts, Counter()
        firsts, self._firsts = self._firsts, Counter()
        return {name: float(amount) for name, amount in counts.items()}, dict(firsts)

    def rows(self) -> tuple[RunRow, ...]:
        """The requests that have run longest."""
        now = self._clock()
        oldest = [run for run, _ in zip(self._open.values(), range(MOST_SHOWN), strict=False)]
        return tuple(_row(run, now) for run in oldest)

    def _count(self, run: _Open) -> None:
        told, counted = run.record.usage, run.counted
        if told is counted:
            return
        run.counted = told
        tokens = told.completion_tokens - counted.completion_tokens
        self._counts["tokens"] += tokens
        if run.mode == Mode.DIFFUSION:
            self._counts["steps"] += told.num_steps - counted.num_steps
            self._counts["step_tokens"] += tokens


def _row(run: _Open, now: float) -> RunRow:
    record, usage = run.record, run.record.usage
    request = record.request
    most_tokens, width, most_steps = 0, 1, 0
    if isinstance(request, Request):
        params = request.params
        most_tokens = params.max_new_tokens
        if run.mode == Mode.DIFFUSION:
            width, most_steps = params.block_size, params.steps_per_block
    prompt = request.token_ids if isinstance(request, ScoreRequest) else request.prompt_token_ids
    return RunRow(
        id=request.id,
        mode=run.mode,
        cell=record.attempts[-1] if record.attempts else "",
        age_s=round(now - run.opened, 1),
        quiet_s=round(now - run.last, 1),
        prompt_tokens=len(prompt),
        tokens=usage.completion_tokens,
        most_tokens=most_tokens,
        # A round of `verified` commits any number of tokens: its blocks are its tokens, as those of `ar` are.
        blocks=usage.completion_tokens if run.mode in (Mode.VERIFIED, Mode.AUTO) else usage.num_blocks,
        most_blocks=-(-most_tokens // width),
        steps=usage.num_steps,
        most_steps=most_steps,
        steps_of=tuple(run.steps_of),
        moves=run.moves,
    )
