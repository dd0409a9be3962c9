"""The router's view of the cells: behind a Serve handle, with Ray's errors turned into ours."""

import asyncio
import logging
from collections.abc import Set
from contextvars import Context
from typing import Any, cast

import grpc
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from cluster.runs import kept
from cluster.runs.cell_lines import Call, CellLines
from cluster.runs.cells import Unfit
from cluster.runs.messages import Wishes
from twotower.core import AnyRequest, FailureEvent, Mode, Request, RequestId, ToldEvent
from twotower.errors import Cancelled, Overloaded, TwoTowerError, Unavailable

logger = logging.getLogger(__name__)

_CUT = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
_OVERTAKEN_S = 2.0
_TAKEN_S = 3.0  # a cell confirms at once; a hung cell does not
_MEETING_S = 2.0


class RemoteAttempt:
    """An attempt on a cell behind the handle: its call through Serve, and its events, which come over a line."""

    def __init__(self, lines: CellLines, call: Call, response: "DeploymentResponse[Any]") -> None:
        self._lines, self._call, self._response = lines, call, response
        self._over = False

    @property
    def cell(self) -> str:
        return self._call.placed.result().cell

    @property
    def fingerprint(self) -> str:
        return self._call.placed.result().fingerprint

    @property
    def vocabulary(self) -> str:
        return self._call.placed.result().vocabulary

    async def taken(self, within_s: float) -> None:
        """Wait until a cell has taken it. Raises Unavailable if none has in so many seconds."""
        try:
            async with asyncio.timeout(within_s):
                await asyncio.shield(self._call.placed)
        except TimeoutError:
            raise Unavailable(f"no cell took this request within {within_s:g} s") from None

    def check_knows(self, request: AnyRequest) -> None:
        """Raises Unfit if the cell's version would ignore a field of the request."""
        unknown = self._call.placed.result().unknown(request)
        if unknown:
            raise Unfit(self.cell, f"is of an older version, which does not know {', '.join(unknown)}")

    async def next(self) -> ToldEvent:
        event = await self._call.inbox.get()
        if isinstance(event, FailureEvent):
            raise event.error
        self._over = event.is_last
        return event

    async def watch(self) -> None:
        """Report the call's end to the reader."""
        error: TwoTowerError = Unavailable("the cell's answer ended before it was finished")
        try:
            await self._response
            if self._lines.is_open(self._call):
                await asyncio.sleep(_OVERTAKEN_S)  # the last events may still be on their way
        except (Exception, asyncio.CancelledError) as failure:
            error = plain_error(failure)
            if isinstance(error, Cancelled):  # not by us: we close the call first
                error = Unavailable("the cell has dropped this request")
        self._over = True
        if self._lines.is_open(self._call):
            self._call.fail(FailureEvent(RequestId("*"), error))

    async def close(self) -> None:
        self._lines.close(self._call)
        if not self._over:
            self._response.cancel()


class RemoteCells:
    """Cells behind a DeploymentHandle, which picks one for each attempt."""

    def __init__(self, handle: "DeploymentHandle[Any]", lines: CellLines) -> None:
        _shorten(handle)
        self._run_on_cell = handle.options(method_name="run", _by_reference=False)
        self._served = handle.options(method_name="served", _by_reference=False)
        self._lines = lines
        self._meeting: asyncio.Task[Set[Mode]] | None = None
        self._watches: set[asyncio.Task[None]] = set()

    async def place(self, request: AnyRequest, timeout_s: float, avoid: Set[str]) -> RemoteAttempt:
        """Raises TwoTowerErrors."""
        mode = _mode(request)
        call = self._lines.open(merging=isinstance(request, Request) and mode.by_token)
        try:
            wishes = Wishes(frozenset(avoid | self._lines.unfit(mode)), self._lines.full(), self._lines.load())
            # Serve's router identifies calls by the id of their HTTP request, which all prompts of a call share. In an
            # empty context each call has its own id.
            called = Context().run(self._run_on_cell.remote, request, timeout_s, call.reply_to, wishes)
            response = cast("DeploymentResponse[Any]", called)
        except Exception as error:
            self._lines.close(call)
            raise plain_error(error) from error
        attempt = RemoteAttempt(self._lines, call, response)
        watch = asyncio.create_task(attempt.watch())
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        try:
            await attempt.taken(_TAKEN_S)
            attempt.check_knows(request)
        except BaseException:
            await attempt.close()
            raise
        return attempt

    def is_to_leave(self, cell: str, request: AnyRequest, fingerprint: str) -> bool:
        return cell not in kept.cells and bool(self._lines.with_room(_mode(request), fingerprint) & kept.cells)

    def elsewhere(self, request: AnyRequest, avoid: Set[str]) -> bool:
        return bool(self._lines.living(_mode(request)) - avoid)

    def lacks(self, request: AnyRequest) -> bool:
        served = self._lines.served()
        return bool(served) and _mode(request) not in served

    async def served(self) -> Set[Mode]:
        """The modes that cells serve now. Meanwhile a cell without a line to this router is asked, if there is one:
        Serve probes each cell that a call avoids for the length of its queue.
        """
        misses_one = not kept.cells or bool(kept.cells - self._lines.living())
        if misses_one and (self._meeting is None or self._meeting.done()):
            self._meeting = asyncio.create_task(self._meet_another())
        served = self._lines.served()
        return served if served or self._meeting is None else await asyncio.shield(self._meeting)

    async def _meet_another(self) -> Set[Mode]:
        """The modes that the new cell serves."""
        try:
            async with asyncio.timeout(_MEETING_S):
                met = Wishes(frozenset(self._lines.living()))
                return frozenset(await self._served.remote(self._lines.address, met))
        except Exception as error:
            logger.debug("no cell answers: %s", error)
            return frozenset()


def _mode(request: AnyRequest) -> Mode:
    """A cell with `ar` serves scores."""
    return request.params.mode if isinstance(request, Request) else Mode.AR


def _shorten(handle: "DeploymentHandle[Any]") -> None:
    """Calls leave on this loop, over gRPC, instead of on a thread of Serve's and through Ray's actor calls.

    Not public in Ray 2.60, which is pinned: a call reaches the cell in 1.0 ms instead of 2.1 (docs/adr/0007).
    """
    handle._init(_run_router_in_separate_loop=False)


def _is_cut(error: BaseException) -> bool:
    """Whether the call's connection, Serve's own gRPC, has broken. Serve reports only some such ends."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in _CUT


def plain_error(error: BaseException) -> TwoTowerError:
    """Our error for an error that came through Ray or Serve."""
    if isinstance(error, RayTaskError):  # which may pose as its cause
        return plain_error(error.cause)
    if isinstance(error, TwoTowerError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded("every cell is full, and so is the queue")
    if isinstance(error, RequestCancelledError | TaskCancelledError | asyncio.CancelledError):
        return Cancelled("the request was cancelled")
    if isinstance(error, RayActorError) or _is_cut(error):
        return Unavailable("the cell that served this request is gone")
    if isinstance(error, RayServeException):
        return Unavailable("no cell can take this request")
    logger.error("a cell failed", exc_info=error)
    return TwoTowerError(f"the cell failed ({type(error).__name__}); the router's log says how")
