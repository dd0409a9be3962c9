"""The cells as a router sees them: behind a Serve handle, with Ray's errors turned into ours."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from twotower.core import BlockEvent, FailureEvent, Request
from twotower.errors import Cancelled, DeadlineExceeded, Overloaded, TwoTowerError, Unavailable


class RemoteCells:
    """Cells behind a DeploymentHandle. The handle picks the cell; a request stays on it."""

    def __init__(self, handle: "DeploymentHandle[Any]") -> None:
        self._generate = handle.options(stream=True, method_name="generate")
        self._ready = handle.options(method_name="ready")

    async def generate(self, request: Request, timeout_s: float) -> AsyncGenerator[BlockEvent, None]:
        """Events of one request. Raises TwoTowerErrors; closing the generator cancels the call."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        response = cast("DeploymentResponseGenerator[Any]", self._generate.remote(request, timeout_s))
        ended = False
        try:
            while not ended:
                event = await _next(response, deadline, timeout_s)
                if isinstance(event, FailureEvent):
                    ended = True
                    raise event.error
                ended = event.finish_reason is not None
                yield event
        finally:
            if not ended:
                response.cancel()

    async def ready(self) -> bool:
        """Whether a cell answers; cells that are all full are there too."""
        try:
            return bool(await self._ready.remote())
        except BackPressureError:
            return True


async def _next(
    response: "DeploymentResponseGenerator[Any]", deadline: float, timeout_s: float
) -> BlockEvent | FailureEvent:
    try:
        async with asyncio.timeout_at(deadline):
            event: BlockEvent | FailureEvent = await anext(response)
            return event
    except TimeoutError:
        raise DeadlineExceeded(f"not finished within {timeout_s:g} s") from None
    except StopAsyncIteration:
        raise Unavailable("the cell's answer ended before it was finished") from None
    except (RayError, RayServeException) as error:
        raise plain_error(error) from error


def plain_error(error: Exception) -> Exception:
    """Ours for one that came through Ray or Serve; the cause itself where a cell's code raised something else."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, TwoTowerError) else plain_error(cause)
    if isinstance(error, BackPressureError):
        return Overloaded("every cell is full and the queue for them too")
    if isinstance(error, RequestCancelledError | TaskCancelledError):
        return Cancelled("the request was cancelled")
    if isinstance(error, RayActorError):
        return Unavailable("the cell that served this request is gone")
    if isinstance(error, RayServeException):
        return Unavailable("no cell can take this request")
    return error
