"""The cells as a router sees them: behind a Serve handle, with Ray's errors turned into ours."""

import asyncio
import logging
from collections.abc import Set
from contextvars import Context
from typing import Any, cast

from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from cluster.event_lines import Call, EventServer
from twotower.core import AnswerEvent, AnyRequest, FailureEvent, Mode, Request, RequestId
from twotower.errors import Cancelled, Overloaded, TwoTowerError, Unavailable

logger = logging.getLogger(__name__)

_OVERTAKEN_S = 2.0
_TAKEN_S = 3.0  # a cell says so at once; one that hangs does not
_MEETING_S = 2.0


class RemoteAttempt:
    """A stay on a cell behind the handle: its call through Serve, and its events, which come another way."""

    def __init__(self, events: EventServer, call: Call, response: "DeploymentResponse[Any]") -> None:
        self._events, self._call, self._response = events, call, response
        self._over = False

    @property
    def cell(self) -> str:
        return self._call.placed.result().cell

    @property
    def fingerprint(self) -> str:
        return self._call.placed.result().fingerprint

    async def taken(self, within_s: float) -> None:
        """Once a cell has taken it. Raises Unavailable where none has in so many seconds."""
        try:
            async with asyncio.timeout(within_s):
                await asyncio.shield(self._call.placed)
        except TimeoutError:
            raise Unavailable(f"no cell took this request within {within_s:g} s") from None

    async def next(self) -> AnswerEvent:
        event = await self._call.inbox.get()
        if isinstance(event, FailureEvent):
            raise event.error
        self._over = event.is_last
        return event

    async def watch(self) -> None:
        """Tell the reader what became of the call."""
        error: TwoTowerError = Unavailable("the cell's answer ended before it was finished")
        try:
            await self._response
            if self._events.is_open(self._call):
                await asyncio.sleep(_OVERTAKEN_S)  # the last events may still be under way
        except (Exception, asyncio.CancelledError) as failure:
            error = plain_error(failure)
        self._over = True
        if self._events.is_open(self._call):
            self._call.take(FailureEvent(RequestId("*"), error))

    async def close(self) -> None:
        self._events.close(self._call)
        if not self._over:
            self._response.cancel()


class RemoteCells:
    """Cells behind a DeploymentHandle, which picks one for each attempt."""

    def __init__(self, handle: "DeploymentHandle[Any]", events: EventServer) -> None:
        _shorten(handle)
        self._run_on_cell = handle.options(method_name="run", _by_reference=False)
        self._ready = handle.options(method_name="ready", _by_reference=False)
        self._events = events
        self._meeting: asyncio.Task[bool] | None = None
        self._watches: set[asyncio.Task[None]] = set()

    async def place(self, request: AnyRequest, timeout_s: float, avoid: Set[str]) -> RemoteAttempt:
        """Raises TwoTowerErrors."""
        call = self._events.open(isinstance(request, Request) and request.params.mode is not Mode.DIFFUSION)
        try:
            avoided = tuple(avoid | self._events.dead())
            # Serve's router tells calls apart by the id of the HTTP request that they are made in, which is one for
            # all prompts of a call. Outside of every context each call has its own.
            called = Context().run(self._run_on_cell.remote, request, timeout_s, call.reply_to, avoided)
            response = cast("DeploymentResponse[Any]", called)
        except Exception as error:
            self._events.close(call)
            raise plain_error(error) from error
        attempt = RemoteAttempt(self._events, call, response)
        watch = asyncio.create_task(attempt.watch())
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        try:
            await attempt.taken(_TAKEN_S)
        except BaseException:
            await attempt.close()
            raise
        return attempt

    def elsewhere(self, avoid: Set[str]) -> bool:
        return bool(self._events.living() - avoid)

    async def ready(self) -> bool:
        """Whether a cell lives and serves. Meanwhile one is asked that has no line to this router yet."""
        if self._meeting is None or self._meeting.done():
            self._meeting = asyncio.create_task(self._meet_another())
        return bool(self._events.living()) or await asyncio.shield(self._meeting)

    async def _meet_another(self) -> bool:
        """Cells that are all full are there too."""
        try:
            async with asyncio.timeout(_MEETING_S):
                return bool(await self._ready.remote(self._events.address, tuple(self._events.living())))
        except BackPressureError:
            return True
        except Exception as error:
            logger.debug("no cell answers: %s", error)
            return False


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
