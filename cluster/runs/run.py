"""A run: one request from the router's checks to its end, on one cell after another where cells die."""

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
_MOST_REFUSALS = 4  # of full cells, or of cells with another checkpoint


@dataclass(frozen=True, slots=True)
class Patience:
    """How often a run goes on after a cell has died, and how long it waits for a cell that takes it."""

    max_resumes: int = 3
    queue_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Means:
    """What all runs of a router have in common."""

    cells: Cells
    patience: Patience = Patience()
    observers: tuple[Observer, ...] = ()
    turns: Turns = field(default_factory=Turns)


class Run:
    """Places its request on a cell and takes the events; where the cell dies, places again what is left of it.

    All waiting is inside `event`, and ends with its deadline. `close` it, whatever happens.
    """

    def __init__(self, record: Record, deadline: Deadline, means: Means) -> None:
        self.record, self.deadline = record, deadline
        self._cells, self._patience, self._observers = means.cells, means.patience, means.observers
        self._turns, self._has_turn = means.turns, False
        self._attempt: Attempt | None = None
        self._refused: set[str] = set()  # cells that shall not be asked again before there is progress
        self._refusals = self._resumes = 0
        self._full_since: float | None = None  # since when no cell has room for what is left
        self._moves_at = 0.0  # when it may next ask another cell to take it from one that is to go
        self._opened = self._begun = self._ended = False
        self._not_taken = ""  # why the last cell that was asked did not take it
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
        """The next event that is news. Raises what ended the run; then it is closed.

        Observers hear of the answer, not of its trace: a request has begun once there is something to keep.
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
        """Nobody wants more of it. What still runs on a cell ends."""
        await self._end(Cancelled("the client has left"))

    async def _in_time(self) -> ToldEvent:
        try:
            if self._given_up is not None:
                raise self._given_up
            async with asyncio.timeout(self.deadline.left_s()) as self._timer:
                return await self._news()
        except DeadlineExceeded:  # the cell's clock has run out first
            raise self.deadline.passed() from None
        except TimeoutError:
            if self._timer is None or not self._timer.expired():
                raise
            raise self._given_up or self.deadline.passed() from None
        finally:
            self._timer = None

    async def _news(self) -> ToldEvent:
        """Place, take events, and where the cell is gone place again with what is committed."""
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
        """What of it has not been told."""
        if isinstance(event, ScoreEvent):
            self.record.check_rated(event)
            return event
        return self.record.news(event) if isinstance(event, BlockEvent) else self.record.trace_news(event)

    async def _wait_for_room(self, error: Overloaded) -> None:
        """All cells that were asked are full. A request that has not begun is refused: raises the error. One that has
        begun waits."""
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
        """The attempt on a cell that stays, where one takes it at once; else this one, and for a while."""
        self._moves_at = asyncio.get_running_loop().time() + _LONGEST_PAUSE_S
        try:
            other = await self._cells.place(self.record.rest(), self.deadline.left_s(), {*self._refused, attempt.cell})
        except DeadlineExceeded:
            raise
        except TwoTowerError as error:  # whatever it is, this cell has not said it
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
        """Go on after this error. Raises it where that has been done often enough."""
        if self._resumes >= self._patience.max_resumes:
            raise error
        self._resumes += 1
        for observer in self._observers:
            observer.resumed(self.record, error)

    async def _place(self) -> Attempt:
        """On a cell with a checkpoint that suits, once it is our turn and there is one that takes it."""
        try:
            async with asyncio.timeout(self._patience.queue_timeout_s) as timer:
                attempt = await self._sought(timer)
        except TimeoutError:
            if not timer.expired():
                raise
            waited, why = f"no cell took this request within {self._patience.queue_timeout_s:g} s", self._not_taken
            told = f"{waited}: {why}" if why else waited
            if not self._is_there_another() and not self._cells.lacks(self.record.request):
                self._turns.refuse_all(told)  # no cell lives: theirs would not come
            raise Unavailable(told) from None
        self._placed(attempt)
        return attempt

    async def _sought(self, timer: asyncio.Timeout) -> Attempt:
        """`timer`: how long no cell may take it. The wait for a turn does not count."""
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
        """On a cell, where one takes it now."""
        if self._cells.lacks(self.record.request):
            self._not_taken = self._not_taken or "no cell serves its mode now"
            self._give_turn_back()  # to one that can be served
            return None
        await self._take_turn(timer)
        try:
            return await self._cells.place(self.record.rest(), self.deadline.left_s(), self._refused)
        except Unavailable as error:
            self._not_taken = str(error)
            if isinstance(error, Unfit):
                self._refused.add(error.cell)
            if not self._is_there_another(self._refused):
                self._refused.clear()  # all that are fit have refused: the next is one of them, and not an unfit one
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
        """After this cell's refusal: whether another may be asked."""
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
    """An answer in chunks, its trace between them, as an asynchronous iterator; once that has ended, the whole of it.

    Text, stop strings and usage are the run's: they do not notice that the cell has changed.
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
        """Those of the answer: what a stop string cut off is not among them."""
        return self._answer.token_ids

    @property
    def text(self) -> str:
        return self._answer.text or ""

    @property
    def offsets(self) -> list[int]:
        """Where the tokens' text begins, where likelihoods are asked for."""
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
        """Itself, once all of it is there."""
        async with aclosing(self):
            async for _ in self:
                pass
        return self


class Scoring(Run):
    """Scores, in one piece. A cell that dies has another one begin again."""

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
