"""Everything that speaks to Ray: starting tower actors in their bundles, calling them, ending them.

A call to an actor waits no longer than its deadline, and whatever goes wrong comes back as one of our own errors.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.frames import connect, framed_all, read_frame
from actors.line import NEWS, ORDERS, Cancel, Ended, Order, order_of
from actors.settings import CellSettings, bundles
from actors.towers import TowerProcess
from twotower.core import AnyRequest, Event, FailureEvent, ReleasedEvent, RequestId
from twotower.engine.handle import EngineStats
from twotower.errors import InvalidRequest, TwoTowerError, Unavailable


class RemoteEngine:
    """A tower actor as an EngineHandle. `name` is what it is called in errors.

    Loading, joining and counters are Ray calls; requests and events have a connection of their own (`open_line`).
    """

    def __init__(self, actor: Any, name: str, timeout_s: float) -> None:
        self._actor, self.name, self._timeout_s = actor, name, timeout_s
        self._pid: int | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._refused: list[Event] = []

    async def open_line(self) -> None:
        """Connect to the process: `add`, `cancel` and `events` work from now on. Raises Unavailable."""
        address = await self.call("open_line")
        try:
            self._reader, self._writer = await connect(address, self._timeout_s)
        except OSError as error:
            raise Unavailable(f"the {self.name} process cannot be reached: {_first_line(error)}") from error

    async def close_line(self) -> None:
        """Hang up, if the line was ever opened."""
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    def add(self, requests: Sequence[AnyRequest]) -> None:
        self._order([order_of(request) for request in requests])

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        self._order([Cancel(request_id) for request_id in request_ids])

    def _order(self, orders: Sequence[Order]) -> None:
        assert self._writer is not None, "the line is not open"
        if self._writer.is_closing():
            raise Unavailable(f"the {self.name} process is gone")
        frames, too_large = framed_all(orders, ORDERS.encode)
        self._writer.write(frames)
        for order in too_large:
            assert not isinstance(order, Cancel)
            error = InvalidRequest.of("request", f"too large for one message to the {self.name} process")
            self._refused += [FailureEvent(order.request.id, error), ReleasedEvent(order.request.id)]

    async def events(self) -> list[Event]:
        """What has come; a sign of life, which comes every second, is an empty list of them."""
        assert self._reader is not None, "the line is not open"
        try:
            async with asyncio.timeout(self._timeout_s):
                news = NEWS.decode(await read_frame(self._reader))
        except TimeoutError:
            raise Unavailable(f"the {self.name} process has said nothing for {self._timeout_s:g} s") from None
        except (OSError, EOFError) as error:
            raise Unavailable(f"the {self.name} process is gone") from error
        match news:
            case [Ended(reason=reason)]:
                raise Unavailable(reason)
        refused, self._refused = self._refused, []
        return refused + [event for event in news if not isinstance(event, Ended)]

    async def stats(self) -> list[EngineStats]:
        stats: list[EngineStats] = await self.call("stats")
        return stats

    async def call(self, method: str, *args: object, timeout_s: float | None = None) -> Any:
        """The method's answer. Raises the TwoTowerError it raised, or Unavailable when the process is gone or mute."""
        patience = self._timeout_s if timeout_s is None else timeout_s
        try:
            return await asyncio.wait_for(getattr(self._actor, method).remote(*args), patience)
        except TimeoutError:
            raise Unavailable(f"the {self.name} process did not answer {method!r} within {patience:g} s") from None
        except RayError as error:
            raise plain_error(error, self.name) from error

    async def load(self, timeout_s: float) -> dict[str, str]:
        """Have the process read its weights; then where it lives. Raises what loading raised."""
        place: dict[str, str] = await self.call("load", timeout_s=timeout_s)
        self._pid = int(place["pid"])
        return place

    def kill(self) -> None:
        """End the process now, whatever it is doing.

        Ray's own kill asks the process, which a hung one never hears; a cell's processes share its node, so the
        signal reaches them.
        """
        ray.kill(self._actor, no_restart=True)
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)


def plain_error(error: BaseException, name: str) -> TwoTowerError:
    """Our error for one that came through Ray."""
    if isinstance(error, RayActorError):
        return Unavailable(f"the {name} process is gone: {_first_line(error)}")
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, TwoTowerError):
            return cause
        return Unavailable(f"the {name} process failed: {type(cause).__name__}: {_first_line(cause)}")
    if isinstance(error, GetTimeoutError):
        return Unavailable(f"the {name} process did not answer in time")
    return Unavailable(f"the {name} process cannot be reached: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def start_tower(
    kind: type[TowerProcess], settings: CellSettings, group: PlacementGroup, bundle: int, name: str
) -> RemoteEngine:
    """A tower process in its bundle of the cell's placement group. Returns before it has loaded its weights."""
    resources = bundles(settings)[bundle]
    strategy = PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=False
    )
    actor_class = ray.remote(kind)
    actor = actor_class.options(
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        scheduling_strategy=strategy,
        max_restarts=0,
        max_concurrency=100,
    ).remote(settings)
    return RemoteEngine(actor, name, settings.engine.link_timeout_s)
