"""A run: one request from the router's checks to its end, on one cell after another where cells die."""

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass

from cluster.deadline import Deadline
from cluster.runs.answer import Chunk, Usage
from cluster.runs.cells import Attempt, Cells
from cluster.runs.observers import Observer
from cluster.runs.record import Gap, Record
from twotower.core import AnswerEvent, BlockEvent, FinishReason, Request, ScoreEvent, ScoreRequest
from twotower.decoding.text import AnswerText
from twotower.errors import Cancelled, DeadlineExceeded, Overloaded, TwoTowerError, Unavailable

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


class Run:
    """Places its request on a cell and takes the events; where the cell dies, places again what is left of it.

    All waiting is inside `event`, and ends with its deadline. `close` it, whatever happens.
    """

    def __init__(self, record: Record, deadline: Deadline, means: Means) -> None:
        self.record, self.deadline = record, deadline
        self._cells, self._patience, self._observers = means.cells, means.patience, means.observers
        self._attempt: Attempt | None = None
        self._refused: set[str] = set()  # cells that shall not be asked again before there is progress
        self._refusals = self._resumes = 0
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
        if self._timer is not None:
            self._timer.reschedule(0)

    async def event(self) -> AnswerEvent:
        """The next event that is news. Raises what ended the run; then it is closed."""
        if not self._opened:
            self._opened = True
            for observer in self._observers:
                observer.opened(self.record)
        try:
            event = await self._in_time()
        except BaseException as error:
            await self._end(error)
            raise
        self._refused.clear()
        self._refusals = 0
        for observer in self._observers:
            if not self._begun:
                observer.first_event(self.record, event)
            observer.event(self.record, event)
        self._begun = True
        return event

    async def close(self) -> None:
        """Nobody wants more of it. What still runs on a cell ends."""
        await self._end(Cancelled("the client has left"))

    async def _in_time(self) -> AnswerEvent:
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

    async def _news(self) -> AnswerEvent:
        """Place, take events, and where the cell is gone place again with what is committed."""
        while True:
            attempt = self._attempt or await self._place()
            try:
                event = await attempt.next()
                news = self.record.news(event) if isinstance(event, BlockEvent) else event
                if news is not None:
                    return news
            except Overloaded:
                await self._leave()
                if not self._try_elsewhere(attempt.cell):
                    raise
            except Unavailable as error:
                if isinstance(error, Gap):
                    logger.error("run %s: cell %s: %s", self.record.name, attempt.cell, error)
                await self._leave()
                self._refused.add(attempt.cell)
                self._resume(error)

    def _resume(self, error: Unavailable) -> None:
        """Go on after this error. Raises it where that has been done often enough."""
        if self._resumes >= self._patience.max_resumes:
            raise error
        self._resumes += 1
        for observer in self._observers:
            observer.resumed(self.record, error)

    async def _place(self) -> Attempt:
        """On a cell with our checkpoint, once there is one that takes it."""
        try:
            async with asyncio.timeout(self._patience.queue_timeout_s) as timer:
                self._attempt = attempt = await self._sought()
        except TimeoutError:
            if not timer.expired():
                raise
            waited, why = f"no cell took this request within {self._patience.queue_timeout_s:g} s", self._not_taken
            raise Unavailable(f"{waited}: {why}" if why else waited) from None
        self.record.attempts.append(attempt.cell)
        for observer in self._observers:
            observer.placed(self.record)
        return attempt

    async def _sought(self) -> Attempt:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                attempt = await self._cells.place(self.record.rest(), self.deadline.left_s(), self._refused)
            except Unavailable as error:
                self._not_taken = str(error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            if attempt.fingerprint == self.record.fingerprint:
                return attempt
            await attempt.close()
            if not self._try_elsewhere(attempt.cell):
                served, wanted = attempt.fingerprint, self.record.fingerprint
                raise Unavailable(f"got a cell with checkpoint {served}, wanted {wanted}, as this request began")

    def _try_elsewhere(self, cell: str) -> bool:
        """After this cell's refusal: whether another may be asked."""
        self._refused.add(cell)
        self._refusals += 1
        return self._refusals < _MOST_REFUSALS and self._cells.elsewhere(self._refused)

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
                if self._opened:
                    for observer in self._observers:
                        observer.ended(self.record, error)


class Generating(Run):
    """An answer in chunks, as an asynchronous iterator; once that has ended, the whole of it.

    Text, stop strings and usage are the run's: they do not notice that the cell has changed.
    """

    def __init__(self, record: Record, deadline: Deadline, means: Means, text: AnswerText) -> None:
        super().__init__(record, deadline, means)
        assert isinstance(record.request, Request), record.request
        self.request, self._answer = record.request, text
        self.usage = Usage(len(self.request.prompt_token_ids))
        self.finish_reason: FinishReason | None = None

    @property
    def token_ids(self) -> list[int]:
        """Those of the answer: what a stop string cut off is not among them."""
        return self._answer.token_ids

    @property
    def text(self) -> str:
        return self._answer.text or ""

    def __aiter__(self) -> "Generating":
        return self

    async def __anext__(self) -> Chunk:
        if self.finish_reason is not None:
            raise StopAsyncIteration
        event = await self.event()
        assert isinstance(event, BlockEvent), event
        token_ids, text = self._answer.push(event.token_ids, last=event.is_last)
        taken = event.first(len(token_ids))
        self.usage = self.usage.plus(taken)
        self.finish_reason = FinishReason.STOP if self._answer.stopped else event.finish_reason
        if self.finish_reason is not None:
            await self._end(None)
        return Chunk(event.start, token_ids, text, taken.num_steps, taken.num_blocks, self.usage, self.finish_reason)

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
