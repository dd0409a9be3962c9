"""A run: one request from the router's checks to its end, on one cell or, if cells die, on several."""

import asyncio
import logging
from collections.abc import Set
from contextlib import aclosing
from dataclasses import dataclass, field

from cluster.runs.answer import Chunk, Piece, Usage
from cluster.runs.cells import Attempt, Cells, Unfit
from cluster.runs.deadline import Deadline
from cluster.runs.observers import Observer
from cluster.runs.record import Gap, Record
from cluster.runs.turns import Turns
from twotower.core import (
    BlockEvent,
    FinishReason,
    Likelihood,
    Request,
    ScoreEvent,
    ScoreRequest,
    ToldEvent,
    TraceEvent,
)
from twotower.errors import Cancelled, DeadlineExceeded, Overloaded, TwoTowerError, Unavailable
from twotower.text.answer_text import AnswerText

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_MOST_REFUSALS = 4  # seconds between tries of full cells, or of cells with another checkpoint


@dataclass(frozen=True, slots=True)
class Patience:
    """How often a run is resumed after a cell's death, and how long it waits for a cell."""

    max_resumes: int = 3
    queue_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Means:
    """The common means of all runs of a router."""

    cells: Cells
    patience: Patience = Patience()
    observers: tuple[Observer, ...] = ()
    turns: Turns = field(default_factory=Turns)


class Run:
    """Places its request on a cell and takes the events; if the cell dies, places the rest of the request again.

    All waiting is inside `event`, and ends with its deadline. Always `close` it.
    """

    def __init__(self, record: Record, deadline: Deadline, means: Means) -> None:
        self.record, self.deadline = record, deadline
        self._cells, self._patience, self._observers = means.cells, means.patience, means.observers
        self._turns, self._has_turn = means.turns, False
        self._attempt: Attempt | None = None
        self._refused: set[str] = set()  # cells that are not asked again before there is progress
        self._refusals = self._resumes = 0
        self._full_since: float | None = None  # since when no cell has room for the rest
        self._moves_at = 0.0  # when it may next ask another cell to take it from one that is being removed
        self._opened = self._begun = self._ended = False
        self._not_taken = ""  # why the last asked cell did not take it
        self._timer: asyncio.Timeout | None = None
        self._given_up: TwoTowerError | None = None

    @property
    def shown_id(self) -> str:
        return self.record.shown_id

    def give_up(self, error: TwoTowerError) -> None:
        """End it with this error, on its cell too."""
        self._given_up = error
        if self._timer is not None and not self._timer.expired():
            self._timer.reschedule(0)

    async def event(self) -> ToldEvent:
        """The next new event. Raises the error that ended the run; then the run is closed.

        Observers get the answer, not its trace: a request has begun once it has committed tokens.
        """
        if not self._opened:
            self._opened = True
            for observer in self._observers:
                observer.opened(self.record)
        try:
            event = await self._in_time()
        except BaseException as error:
            await self._end(error)
            raise
        if isinstance(event, TraceEvent):
            return event
        self._refused.clear()
        self._refusals, self._full_since = 0, None
        for observer in self._observers:
            if not self._begun:
                observer.first_event(self.record, event)
            observer.event(self.record, event)
        self._begun = True
        return event

    async def close(self) -> None:
        """The client wants no more. Work on a cell ends."""
        await self._end(Cancelled("the client has left"))

    async def _in_time(self) -> ToldEvent:
        try:
            if self._given_up is not None:
                raise self._given_up
            async with asyncio.timeout(self.deadline.left_s()) as self._timer:
                return await self._news()
        except DeadlineExceeded:  # the cell's deadline has passed first
            raise self.deadline.passed() from None
        except TimeoutError:
            if self._timer is None or not self._timer.expired():
                raise
            raise self._given_up or self.deadline.passed() from None
        finally:
            self._timer = None

    async def _news(self) -> ToldEvent:
        """Place the request, take events, and if the cell is lost, place it again with its committed tokens."""
        while True:
            attempt = self._attempt or await self._place()
            if self._is_to_move(attempt):
                attempt = await self._handed_over(attempt)
            try:
                event = await attempt.next()
                news = self._new(event)
                if news is not None:
                    return news
            except Overloaded as error:
                await self._leave()
                if not self._try_elsewhere(attempt.cell):
                    await self._wait_for_room(error)
            except Unavailable as error:
                if isinstance(error, Gap):
                    logger.error("run %s: cell %s: %s", self.record.name, attempt.cell, error)
                await self._leave()
                self._refused.add(attempt.cell)
                self._resume(error)

    def _new(self, event: ToldEvent) -> ToldEvent | None:
        """The new part of the event."""
        if isinstance(event, ScoreEvent):
            self.record.check_rated(event)
            return event
        return self.record.news(event) if isinstance(event, BlockEvent) else self.record.trace_news(event)

    async def _wait_for_room(self, error: Overloaded) -> None:
        """All asked cells are full. A request that has not begun is refused: raises the error. A request that has begun
        waits.
        """
        if not self._begun:
            raise error
        now, patience_s = asyncio.get_running_loop().time(), self._patience.queue_timeout_s
        self._full_since = self._full_since or now
        if now - self._full_since > patience_s:
            raise Unavailable(f"no cell had room to go on with this request within {patience_s:g} s")
        self._refused.clear()
        self._refusals = 0
        await asyncio.sleep(_LONGEST_PAUSE_S)

    def _is_to_move(self, attempt: Attempt) -> bool:
        now = asyncio.get_running_loop().time()
        return now >= self._moves_at and self._cells.is_to_leave(
            attempt.cell, self.record.request, self.record.fingerprint
        )

    async def _handed_over(self, attempt: Attempt) -> Attempt:
        """The attempt on a kept cell, if one takes it at once; else the present attempt, for a while."""
        self._moves_at = asyncio.get_running_loop().time() + _LONGEST_PAUSE_S
        try:
            other = await self._cells.place(self.record.rest(), self.deadline.left_s(), {*self._refused, attempt.cell})
        except DeadlineExceeded:
            raise
        except TwoTowerError as error:  # any error here is not this cell's
            logger.debug("run %s stays on cell %s: %s", self.record.name, attempt.cell, error)
            return attempt
        if other.cell == attempt.cell or other.fingerprint != self.record.fingerprint:
            await other.close()
            return attempt
        logger.info("run %s: cell %s hands over to %s", self.record.name, attempt.cell, other.cell)
        await self._leave()
        self._placed(other)
        for observer in self._observers:
            observer.handed_over(self.record)
        return other

    def _placed(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self.record.attempts.append(attempt.cell)
        for observer in self._observers:
            observer.placed(self.record)

    def _resume(self, error: Unavailable) -> None:
        """Resume after this error. Raises it if the run has been resumed too often."""
        if self._resumes >= self._patience.max_resumes:
            raise error
        self._resumes += 1
        for observer in self._observers:
            observer.resumed(self.record, error)

    async def _place(self) -> Attempt:
        """Place it on a cell with a suitable checkpoint, once it has a turn and a cell takes it."""
        try:
            async with asyncio.timeout(self._patience.queue_timeout_s) as timer:
                attempt = await self._sought(timer)
        except TimeoutError:
            if not timer.expired():
                raise
            waited, why = f"no cell took this request within {self._patience.queue_timeout_s:g} s", self._not_taken
            told = f"{waited}: {why}" if why else waited
            if not self._is_there_another() and not self._cells.lacks(self.record.request):
                self._turns.refuse_all(told)  # no cell lives, so turns would not come
            raise Unavailable(told) from None
        self._placed(attempt)
        return attempt

    async def _sought(self, timer: asyncio.Timeout) -> Attempt:
        """`timer`: how long it may be without a cell. The wait for a turn does not count."""
        pause_s = _FIRST_PAUSE_S
        while True:
            attempt = await self._asked(timer)
            if attempt is None:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            if self.record.suits(attempt.fingerprint, attempt.vocabulary):
                return attempt
            await attempt.close()
            if not self._try_elsewhere(attempt.cell):
                served, wanted = attempt.fingerprint, self.record.fingerprint
                raise Unavailable(f"got a cell with checkpoint {served}, wanted {wanted}, as this request began")

    async def _asked(self, timer: asyncio.Timeout) -> Attempt | None:
        """Place it on a cell, if one takes it now."""
        if self._cells.lacks(self.record.request):
            self._not_taken = self._not_taken or "no cell serves its mode now"
            self._give_turn_back()  # leave the turn to a request that can be served
            return None
        await self._take_turn(timer)
        try:
            return await self._cells.place(self.record.rest(), self.deadline.left_s(), self._refused)
        except Unavailable as error:
            self._not_taken = str(error)
            if isinstance(error, Unfit):
                self._refused.add(error.cell)
            if not self._is_there_another(self._refused):
                self._refused.clear()  # all fit cells have refused: the next one is one of them, and not an unfit one
            return None

    async def _take_turn(self, timer: asyncio.Timeout) -> None:
        if self._has_turn:
            return
        if self.record.attempts:
            self._turns.take_again(self.record.caller)
            self._has_turn = True
        else:
            clock, ends_at = asyncio.get_running_loop().time, timer.when()
            assert ends_at is not None
            left_s = ends_at - clock()
            timer.reschedule(None)
            await self._turns.take(self.record.caller, self.record.request.priority)
            self._has_turn = True
            timer.reschedule(clock() + left_s)

    def _give_turn_back(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._turns.give_back(self.record.caller)

    def _try_elsewhere(self, cell: str) -> bool:
        """Whether another cell may be asked after this cell's refusal."""
        self._refused.add(cell)
        self._refusals += 1
        return self._refusals < _MOST_REFUSALS and self._is_there_another(self._refused)

    def _is_there_another(self, beside: Set[str] = frozenset()) -> bool:
        return self._cells.elsewhere(self.record.request, beside)

    async def _leave(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            await attempt.close()

    async def _end(self, error: BaseException | None) -> None:
        if not self._ended:
            self._ended = True
            try:
                await self._leave()
            finally:
                self._give_turn_back()
                if self._opened:
                    for observer in self._observers:
                        observer.ended(self.record, error)


class Generating(Run):
    """An answer in chunks, with its trace between them, as an asynchronous iterator. After its end it holds the whole
    answer.

    Text, stop strings and usage belong to the run, so a change of cells does not affect them.
    """

    def __init__(self, record: Record, deadline: Deadline, means: Means, text: AnswerText) -> None:
        super().__init__(record, deadline, means)
        assert isinstance(record.request, Request), record.request
        self.request, self._answer = record.request, text
        self.usage = Usage(len(self.request.prompt_token_ids))
        self.likelihoods: list[Likelihood] = []  # where they are asked for
        self.finish_reason: FinishReason | None = None

    @property
    def token_ids(self) -> list[int]:
        """The answer's token ids, without those cut off by a stop string."""
        return self._answer.token_ids

    @property
    def text(self) -> str:
        return self._answer.text or ""

    @property
    def offsets(self) -> list[int]:
        """Where each token's text begins, if likelihoods are requested."""
        return self._answer.offsets

    def __aiter__(self) -> "Generating":
        return self

    async def __anext__(self) -> Piece:
        if self.finish_reason is not None:
            raise StopAsyncIteration
        event = await self.event()
        if isinstance(event, TraceEvent):
            return event
        assert isinstance(event, BlockEvent), event
        token_ids, text = self._answer.push(event.token_ids, last=event.is_last)
        taken = event.first(len(token_ids))
        self.usage = self.record.usage = self.usage.plus(taken)
        self.finish_reason = FinishReason.STOP if self._answer.stopped else event.finish_reason
        self.record.finish_reason = self.finish_reason
        if self.finish_reason is not None:
            await self._end(None)
        self.likelihoods += taken.likelihoods
        offsets = self.offsets[event.start :]
        return Chunk(event.start, token_ids, text, taken, self.usage, self.finish_reason, tuple(offsets))

    async def aclose(self) -> None:
        await self.close()

    async def whole(self) -> "Generating":
        """Itself, once the answer is complete."""
        async with aclosing(self):
            async for _ in self:
                pass
        return self


class Scoring(Run):
    """Scores, in one piece. If a cell dies, another one begins again."""

    def __init__(self, record: Record, deadline: Deadline, means: Means) -> None:
        super().__init__(record, deadline, means)
        assert isinstance(record.request, ScoreRequest), record.request
        self.request = record.request

    async def whole(self) -> ScoreEvent:
        try:
            event = await self.event()
            assert isinstance(event, ScoreEvent), event
            await self._end(None)
            return event
        finally:
            await self.close()
