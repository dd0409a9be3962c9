"""Faults: which process, which signal, at which moment of a request's life; and rounds of load around one fault."""

import asyncio
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import psutil

from benchmarks.chaos_parts.client import Asked, Client, Load, Question
from benchmarks.chaos_parts.service import Service

PHASES = ("prefill", "step", "commit", "resume")
HUNG = " hung"
_COMMIT_S = 0.005  # so long after an event its commit is still under way
_JUST_BEFORE_S = 0.4  # between a first fault and the one that meets its resuming
_HEAL_S = 5.0  # so long a controller or a raylet hangs; nobody replaces it
_HEALING = ("controller", "raylet")
_BURST = 6
_WARM_S, _WHOLE_S, _DRAIN_S, _IDLE_S = 60.0, 180.0, 180.0, 20.0


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind`: context, denoiser, tower, cell, controller, raylet, router or proxy; ` hung` where it is stopped."""

    kind: str
    phase: str

    @property
    def role(self) -> str:
        return self.kind.removesuffix(HUNG)

    @property
    def hangs(self) -> bool:
        return self.kind.endswith(HUNG)

    def __str__(self) -> str:
        return f"{self.kind} in {self.phase}"


@dataclass(frozen=True, slots=True)
class Hit:
    """A streaming request that was under way at the fault. `resumed`: it went on elsewhere."""

    phase: str
    stall_s: float
    resumed: bool


@dataclass(slots=True)
class Round:
    """What became of one fault. Times in seconds after it."""

    fault: Fault
    at: float = 0.0
    whole_s: float = 0.0
    hits: list[Hit] = field(default_factory=list)
    resumed: int = 0
    asked: list[Asked] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def outcomes(self, begin: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.outcome.startswith(begin)]

    @property
    def met(self) -> bool:
        """Whether a request in the phase that was aimed at went on elsewhere because of it."""
        return any(hit.resumed and hit.phase == self.fault.phase for hit in self.hits)

    @property
    def stalls(self) -> list[float]:
        """Of what went on elsewhere; where nothing did, of all that was under way."""
        resumed = [hit.stall_s for hit in self.hits if hit.resumed]
        return resumed or [hit.stall_s for hit in self.hits]


def phase_of(asked: Asked, now: float) -> str:
    """What a client can tell of a request's phase."""
    if not asked.events:
        return "prefill"
    return "commit" if now - asked.events[-1] < _COMMIT_S else "step"


async def one_round(service: Service, client: Client, questions: list[Question], fault: Fault, clients: int) -> Round:
    """Load, the fault in the middle of it, load until the service is whole again; then nothing may be left of it."""
    done, again = Round(fault), fault.role in ("router", "proxy")
    trigger: list[Callable[[], None]] = []  # fired by the next event

    def heard(asked: Asked) -> None:
        while trigger:
            trigger.pop()()

    load = Load(partial(client.ask, heard=heard, retry=again), questions, f"c{time.time_ns():x}")
    load.start(clients)
    try:
        await _warm(load, clients)
        service.resumed()
        await _inject(service, load, done, trigger)
        met = {asked.label: (asked, phase_of(asked, done.at)) for asked in load.in_flight}
        await asyncio.sleep(1.0)
        if fault.hangs and fault.role in _HEALING:
            await asyncio.sleep(_HEAL_S)
            _signal(service, fault.role, signal.SIGCONT)
        if fault.role == "raylet" and not fault.hangs:
            await asyncio.to_thread(service.add_second_node)
        whole = asyncio.create_task(service.until_right(_WHOLE_S))
        while not whole.done() and any(math.isinf(asked.ended) for asked, _ in met.values()):
            await asyncio.sleep(0.05)
        load.ease(clients // 4)  # others have the cores, to start what is missing
        took_s, wrong = await whole
        done.whole_s = time.monotonic() - done.at
        done.wrong += [f"not whole after {took_s:.0f} s: {text}" for text in wrong]
    finally:
        await load.stop(_DRAIN_S)
    resumed = service.resumed()
    done.asked, done.resumed = load.asked, len(resumed)
    for label, (asked, phase) in met.items():
        if asked.question.is_stream and asked.ended > done.at:
            name = "resume" if fault.phase == "resume" and label in resumed else phase
            done.hits.append(Hit(name, asked.stall_s(done.at), label in resumed))
    _, wrong = await service.until_right(_IDLE_S, idle=True)
    done.wrong += [f"idle: {text}" for text in wrong]
    return done


async def _warm(load: Load, clients: int) -> None:
    """Until most streams are under way."""
    deadline = time.monotonic() + _WARM_S
    while sum(bool(asked.events) for asked in load.in_flight) < clients // 2:
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing moves: {[a.outcome for a in load.asked if a.outcome][:3]}")
        await asyncio.sleep(0.01)


async def _inject(service: Service, load: Load, done: Round, trigger: list[Callable[[], None]]) -> None:
    fault = done.fault
    number = signal.SIGSTOP if fault.hangs else signal.SIGKILL
    victim = _victim(service, fault.role)

    def strike() -> None:
        done.at = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(victim.pid, number)

    match fault.phase:
        case "prefill":
            load.also(_BURST)
            await asyncio.sleep(0.03)
            strike()
        case "step":
            struck = asyncio.Event()
            trigger.append(struck.set)
            await asyncio.wait_for(struck.wait(), _WARM_S)
            await asyncio.sleep(2 * _COMMIT_S)
            strike()
        case "commit":
            struck = asyncio.Event()
            trigger += [struck.set, strike]  # the last is fired first
            await asyncio.wait_for(struck.wait(), _WARM_S)
        case "resume":
            victim = _first_of_two(service, fault.role, victim)
            await asyncio.sleep(_JUST_BEFORE_S)
            strike()


def _first_of_two(service: Service, role: str, victim: psutil.Process) -> psutil.Process:
    """Kills another process first, so that requests are being resumed when the victim is struck. With two cells this is
    the other cell, else another tower or the same cell's replica.
    """
    processes = service.processes()
    split = service.shape.placement == "split"
    if service.shape.cells > 1:
        other = [cell for cell in processes["cell"] if not _same_cell(service, cell, victim)]
        other[0].kill()
    elif role in ("cell", "denoiser"):
        processes["context" if split else "tower"][0].kill()
    else:
        processes["denoiser" if split and role != "denoiser" else "tower"][0].kill()
    return victim


def _same_cell(service: Service, cell: psutil.Process, victim: psutil.Process) -> bool:
    """There is one on each node. What is no cell's, the controller say, counts as of the cell on its node."""
    if victim.name() == "raylet":
        return cell.ppid() == victim.pid
    return cell.ppid() == victim.ppid()


def _victim(service: Service, role: str) -> psutil.Process:
    if role == "raylet":
        return service.raylet()
    found = service.processes()[role]
    return found[int(time.time()) % len(found)]


def _signal(service: Service, role: str, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        _victim(service, role).send_signal(number)
