"""How each candidate notices that the other side died, hangs or does not read; a fresh pair of processes for each."""

import os
import signal
import time
from dataclasses import dataclass

from benchmarks.transport_parts.seam import Secrets
from benchmarks.transport_parts.sides import HANG, HOLD, SPILL, Process, both

LIMIT_S = 6.0
_STANDSTILL_S = 5.0


@dataclass(frozen=True, slots=True)
class Faults:
    """Seconds until noticed; None: not within LIMIT_S. With the words it was noticed in."""

    killed_s: float | None
    stopped_s: float | None
    hung_s: float | None
    router_stopped_s: float | None
    emitted_to_stopped: int
    emitted_to_slow: int
    beside_slow_s: float
    slow_ending: str
    words: dict[str, str]


def provoke(name: str, loop: str, secrets: Secrets | None) -> Faults:
    words: dict[str, str] = {}
    with both(name, loop, secrets) as (cell, router):
        killed_s = _signalled(cell, router, signal.SIGKILL, words, "killed")
    with both(name, loop, secrets) as (cell, router):
        stopped_s = _signalled(cell, router, signal.SIGSTOP, words, "stopped")
    with both(name, loop, secrets) as (_, router):
        router.call("open", HANG)
        router.tell("wait for loss")
        hung_s = _noticed(router, time.monotonic() + 0.2, words, "hung")
    with both(name, loop, secrets) as (cell, router):
        router.call("open", SPILL)
        router.tell("wait for loss")  # it reads as fast as it can, until it is stopped
        time.sleep(0.1)
        os.kill(router.pid, signal.SIGSTOP)
        since, before = time.monotonic(), cell.call("emitted")
        emitted_to_stopped = _at_standstill(cell) - before
        cell.tell("wait for loss")
        router_stopped_s = _noticed(cell, since, words, "router stopped")
    with both(name, loop, secrets) as (cell, router):
        router.tell("slow", _STANDSTILL_S)
        emitted_to_slow = _at_standstill(cell)
        slow = router.told()
    return Faults(
        killed_s,
        stopped_s,
        hung_s,
        router_stopped_s,
        emitted_to_stopped,
        emitted_to_slow,
        slow.other_s,
        slow.ending,
        words,
    )


def _signalled(cell: Process, router: Process, number: int, words: dict[str, str], fault: str) -> float | None:
    router.call("open", HOLD)
    router.tell("wait for loss")
    time.sleep(0.2)
    since = time.monotonic()
    os.kill(cell.pid, number)
    return _noticed(router, since, words, fault)


def _at_standstill(cell: Process) -> int:
    """Events emitted when no more are, or after a while."""
    end, emitted = time.monotonic() + _STANDSTILL_S, -1
    while time.monotonic() < end:
        time.sleep(0.3)
        now = cell.call("emitted")
        if now == emitted:
            break
        emitted = now
    return int(emitted)


def _noticed(watcher: Process, since: float, words: dict[str, str], fault: str) -> float | None:
    if not watcher.says_within(LIMIT_S):
        return None
    notice = watcher.told()
    words[fault] = notice.reason
    return float(notice.at - since)
