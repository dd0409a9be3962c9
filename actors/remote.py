"""All calls to Ray: start tower actors in their bundles, call them, end them.

A call to an actor waits at most until its deadline, and every failure becomes one of our own errors.
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

from actors.hosts import Host
from actors.line import LINE, SILENCE_S, Add, Cancel, Ended, Instruction, News, Score, instruction_of
from actors.settings import CellSettings, bundles
from twotower.core import AnyRequest, Event, FailureEvent, ReleasedEvent, RequestId
from twotower.engine.handle import EngineStats
from twotower.errors import InvalidRequest, TwoTowerError, Unavailable
from twotower.transport.connection import Connection, TooLarge, connect


class RemoteEngine:
    """A tower actor as an EngineHandle. `name`: its name in errors.

    Loading, joining and counters are Ray calls; requests and events use a separate connection (`open_line`).
    """

    def __init__(self, actor: Any, name: str, timeout_s: float) -> None:
        self._actor, self.name, self._timeout_s = actor, name, timeout_s
        self._pid: int | None = None
        self._line: Connection[Instruction | News] | None = None
        self._events: list[Event] = []
        self._failure: str | None = None
        self._arrived = asyncio.Event()

    async def open_line(self) -> None:
        """Connect to the process: `add`, `cancel` and `events` work from now on. Raises Unavailable."""
        address = await self.call("open_line")
        self.close_line()
        self._failure = None
        self._arrived.clear()
        try:
            self._line, _ = await connect(address, {}, LINE, self, silence_s=min(SILENCE_S, self._timeout_s))
        except Unavailable as error:
            raise Unavailable(f"the {self.name} process cannot be reached: {error}") from error

    def close_line(self) -> None:
        """Close the line, if it was ever opened."""
        if self._line is not None:
            self._line.close()

    @property
    def speaks(self) -> bool:
        """Whether its line is open: the process lives; its engine may not."""
        return self._line is not None and self._line.lost is None

    def take(self, message: Instruction | News) -> None:
        """From the line."""
        match message:
            case Ended(reason):
                self._fail(reason)
            case Cancel() | Add() | Score():
                raise Unavailable(f"sent a {type(message).__name__}, wanted an event")
            case _:
                self._put([message])

    def beat(self) -> Sequence[Instruction]:
        return ()

    def lost(self, reason: str) -> None:
        """From the line: it has ended."""
        self._fail(f"the {self.name} process {reason}")

    def _fail(self, reason: str) -> None:
        """The engine's own reason comes first, and stays."""
        self._failure = self._failure or reason
        self._arrived.set()

    def _put(self, events: Sequence[Event]) -> None:
        self._events += events
        self._arrived.set()

    def add(self, requests: Sequence[AnyRequest]) -> None:
        for request in requests:
            try:
                self._instruct(instruction_of(request))
            except TooLarge as error:
                too_large = InvalidRequest.of("request", f"for the {self.name} process: {error}")
                self._put([FailureEvent(request.id, too_large), ReleasedEvent(request.id)])

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        for request_id in request_ids:
            self._instruct(Cancel(request_id))

    def _instruct(self, instruction: Instruction) -> None:
        assert self._line is not None, "the line is not open"
        if self._line.lost is not None:
            raise Unavailable(f"the {self.name} process {self._line.lost}")
        self._line.post(instruction)

    async def events(self) -> list[Event]:
        await self._arrived.wait()
        if self._events:
            events, self._events = self._events, []
            if self._failure is None:
                self._arrived.clear()
            return events
        raise Unavailable(self._failure or "")

    async def stats(self) -> list[EngineStats]:
        stats: list[EngineStats] = await self.call("stats")
        return stats

    async def call(self, method: str, *args: object, timeout_s: float | None = None) -> Any:
        """The method's result. Raises its TwoTowerError, or Unavailable when the process is lost or silent."""
        patience = self._timeout_s if timeout_s is None else timeout_s
        try:
            return await asyncio.wait_for(self._actor.call.remote(method, *args), patience)
        except TimeoutError:
            raise Unavailable(f"the {self.name} process did not answer {method!r} within {patience:g} s") from None
        except RayError as error:
            raise plain_error(error, self.name) from error

    async def load(self, timeout_s: float) -> dict[str, str]:
        """Let the process load its weights; returns its home. Raises loading's error."""
        home: dict[str, str] = await self.call("load", timeout_s=timeout_s)
        self._pid = int(home["pid"])
        return home

    def kill(self) -> None:
        """Kill the process now.

        Ray's own kill asks the process, which does not work for a hung one. A cell's processes are on its node, so a
        signal reaches them.
        """
        ray.kill(self._actor, no_restart=True)
        pid, self._pid = self._pid, None  # the process id may be reused by the next time
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


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
    kind: type[Host], settings: CellSettings, group: PlacementGroup, bundle: int, name: str
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
