"""The cells as a router sees them: behind a Serve handle, with Ray's errors turned into ours."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar, cast

from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from cluster.event_lines import EventServer, ReplyTo
from twotower.core import AnyRequest, BlockEvent, FailureEvent, Mode, Request, RequestId, ScoreEvent, ScoreRequest
from twotower.engine.inbox import Inbox
from twotower.errors import Cancelled, DeadlineExceeded, Overloaded, TwoTowerError, Unavailable

logger = logging.getLogger(__name__)

_OVERTAKEN_S = 2.0

AnswerKind = TypeVar("AnswerKind", BlockEvent, ScoreEvent)


class RemoteCells:
    """Cells behind a DeploymentHandle. The handle picks the cell; a request stays on it."""

    def __init__(self, handle: "DeploymentHandle[Any]", events: EventServer) -> None:
        _shorten(handle)
        self._run_on_cell = handle.options(method_name="run", _by_reference=False)
        self._ready = handle.options(method_name="ready", _by_reference=False)
        self._events = events
        self._calls: set[asyncio.Task[None]] = set()
        self._given_up: FailureEvent | None = None

    def generate(self, request: Request, timeout_s: float) -> AsyncGenerator[BlockEvent, None]:
        """Events of one request. Raises TwoTowerErrors; closing the generator cancels the call."""
        return self._run(request, BlockEvent, timeout_s, merging=request.params.mode is not Mode.DIFFUSION)

    async def score(self, request: ScoreRequest, timeout_s: float) -> ScoreEvent:
        """Raises as `generate` does; cancelling it cancels the call."""
        async with aclosing(self._run(request, ScoreEvent, timeout_s)) as events:
            return await anext(events)

    async def _run(
        self, request: AnyRequest, kind: type[AnswerKind], timeout_s: float, merging: bool = False
    ) -> AsyncGenerator[AnswerKind, None]:
        if self._given_up is not None:
            raise self._given_up.error
        reply_to, inbox = self._events.open(merging)
        try:
            response = cast("DeploymentResponse[Any]", self._run_on_cell.remote(request, timeout_s, reply_to))
        except BaseException:
            self._events.close(reply_to)
            raise
        call = asyncio.create_task(self._watch(response, request, reply_to, inbox))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        late = FailureEvent(request.id, DeadlineExceeded(f"not finished within {timeout_s:g} s"))
        timer = asyncio.get_running_loop().call_later(timeout_s, inbox.put, late)
        ended = False
        try:
            while not ended:
                event = await inbox.get()
                if isinstance(event, FailureEvent):
                    ended = event is not late and event is not self._given_up
                    raise event.error
                assert isinstance(event, kind), event
                ended = event.is_last
                yield event
        finally:
            timer.cancel()
            self._events.close(reply_to)
            if not ended:
                response.cancel()

    async def _watch(
        self, response: "DeploymentResponse[Any]", request: AnyRequest, reply_to: ReplyTo, inbox: Inbox
    ) -> None:
        """Tell the reader what became of the call: its events come another way, its failure comes here."""
        error: TwoTowerError = Unavailable("the cell's answer ended before it was finished")
        try:
            await response
            if self._events.is_open(reply_to):
                await asyncio.sleep(_OVERTAKEN_S)  # the last events may still be under way
        except (Exception, asyncio.CancelledError) as failure:
            error = plain_error(failure)
        inbox.put(FailureEvent(request.id, error))

    def give_up(self, error: TwoTowerError) -> None:
        """Whatever still runs ends with `error`, here and on its cell."""
        self._given_up = FailureEvent(RequestId("*"), error)
        self._events.tell_all(self._given_up)

    async def ready(self) -> bool:
        """Whether a cell answers; cells that are all full are there too."""
        try:
            return bool(await self._ready.remote())
        except BackPressureError:
            return True


def _shorten(handle: "DeploymentHandle[Any]") -> None:
    """Calls leave on this loop, over gRPC, instead of on a thread of Serve's and through Ray's actor calls.

    Not public in Ray 2.60, which is pinned: a call reaches the cell in 1.0 ms instead of 2.1 (docs/adr/0007).
    """
    handle._init(_run_router_in_separate_loop=False)


def plain_error(error: BaseException) -> TwoTowerError:
    """Ours for one that came through Ray or Serve."""
    if isinstance(error, RayTaskError):  # which may pose as its cause
        return plain_error(error.cause)
    if isinstance(error, TwoTowerError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded("every cell is full and the queue for them too")
    if isinstance(error, RequestCancelledError | TaskCancelledError | asyncio.CancelledError):
        return Cancelled("the request was cancelled")
    if isinstance(error, RayActorError):
        return Unavailable("the cell that served this request is gone")
    if isinstance(error, RayServeException):
        return Unavailable("no cell can take this request")
    logger.error("a cell failed", exc_info=error)
    return TwoTowerError(f"the cell failed ({type(error).__name__}); the router's log says how")
